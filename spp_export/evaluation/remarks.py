"""What a reader has to be told beside a figure of quality. Imports nothing heavy."""

from __future__ import annotations

# Below this many predicted tokens a figure says little of other text.
FEW_TOKENS = 2000
# Mean KL in nats from which answers are likely to differ in ways that users notice.
NOTICEABLE_KL = 0.1


def remarks(tokens: float, mean_kl: float | None) -> list[str]:
    """Of a mean KL over so many tokens; None where it is not finite."""
    sentences = []
    if tokens < FEW_TOKENS:
        sentences.append(f"uncertain: measured on fewer than {FEW_TOKENS:,} tokens")
    if mean_kl is None or mean_kl >= NOTICEABLE_KL:
        sentences.append(
            f"answers will differ noticeably: the mean KL is {NOTICEABLE_KL:g} or more"
        )
    return sentences

"""What a reader has to be told beside a figure of quality. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import asdict, dataclass

# Below this many predicted tokens a figure says little of other text.
FEW_TOKENS = 2000
# Mean KL in nats from which answers are likely to differ in ways that users notice.
NOTICEABLE_KL = 0.1


@dataclass(frozen=True)
class Wanted:
    """How near to the dense model a slim one is to be; None where nothing is asked.

    max_kl      highest mean KL, in nats
    same_token  lowest share of tokens that both models find likeliest
    """

    max_kl: float | None = None
    same_token: float | None = None

    @property
    def given(self) -> dict[str, float]:
        """What is asked, by the flags of the command line."""
        return {"--" + name.replace("_", "-"): value for name, value in self.to_dict().items()}

    @property
    def words(self) -> str:
        """What is asked, as it was given on the command line."""
        return " and ".join(f"{flag} {value:g}" for flag, value in self.given.items())

    def to_dict(self) -> dict[str, float]:
        """What is asked, for plan.json and verify.json."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def held_by(self, mean_kl: float, top1: float, share: float = 1.0) -> bool:
        """Whether figures are within what is asked, or within a share of what that leaves."""
        # A model that is broken has no figure that compares.
        near = self.max_kl is None or mean_kl <= share * self.max_kl
        return near and (self.same_token is None or 1 - top1 <= share * (1 - self.same_token))


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

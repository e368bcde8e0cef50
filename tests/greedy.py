"""Greedy decoding by the definition, and prompts on which it does not hang on rounding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from factories import VOCAB
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Greedy:
    """Token ids that follow a prompt, eos included, and the smallest lead of the best logit over
    the second in any step."""

    tokens: list[int]
    margin: float


def greedy(model: PreTrainedModel, prompt: Sequence[int], new_tokens: int, eos: int = 2) -> Greedy:
    """One forward pass over the whole text per token: no cache, no padding, no masks."""
    ids, margin = list(prompt), float("inf")
    for _ in range(new_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1].float()
        best = logits.topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        ids.append(int(best.indices[0]))
        if ids[-1] == eos:
            break
    return Greedy(ids[len(prompt) :], margin)


def random_prompts(length: int, seed: int = 0) -> Iterator[list[int]]:
    """Prompts of ordinary tokens of the factories' tokenizer, one after the other."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        # ids 0 to 2 and the last are special
        yield torch.randint(3, VOCAB - 1, (length,), generator=generator).tolist()


def clear_prompt(
    model: PreTrainedModel,
    prompts: Iterable[Sequence[int]],
    new_tokens: int,
    margin: float = 0.01,
) -> tuple[list[int], list[int]]:
    """The first of `prompts` whose every step is won by `margin`, and its `new_tokens` tokens, at
    least three of them distinct.

    Random models come near to ties, which rounding decides, or repeat one token for ever; the
    margin is a hundred times what two float32 implementations differ by. The reference alone
    decides which prompt is taken.
    """
    for prompt in islice(prompts, 100):
        found = greedy(model, prompt, new_tokens)
        varied = len(found.tokens) == new_tokens and len(set(found.tokens)) >= 3
        if varied and found.margin >= margin:
            return list(prompt), found.tokens
    raise AssertionError("no prompt of this model is free of near ties and of repetition")

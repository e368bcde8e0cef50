"""What transformers answers to prompts, and the comparison of that with what vLLM does."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from checking import require
from transformers import AutoModelForCausalLM, PreTrainedModel

# Nats: between the log-probabilities that two programs compute in fp32.
TOLERANCE = 2e-3
# A page of the KV cache has 128 tokens.
PROMPT_TOKENS = (3, 40, 150)
NEW_TOKENS = 8


class Answer(NamedTuple):
    """Greedy tokens after a prompt, and the log-probability of each."""

    tokens: list[int]
    logprobs: list[float]


def random_prompts(vocabulary: int) -> list[list[int]]:
    """Token ids."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(3, vocabulary, (count,), generator=generator).tolist()
        for count in PROMPT_TOKENS
    ]


def load(path: Path) -> PreTrainedModel:
    """The model in fp32, by the code that travels with it."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=True)


def with_transformers(path: Path, prompts: list[list[int]]) -> list[Answer]:
    """By whole sequences, without a cache."""
    model = load(path)
    return [greedy(model, prompt) for prompt in prompts]


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: list[int]) -> Answer:
    """Of one prompt."""
    ids, answer = list(prompt), Answer([], [])
    for _ in range(NEW_TOKENS):
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        best = logits.float().log_softmax(-1).max(-1)
        ids.append(int(best.indices))
        answer.tokens.append(int(best.indices))
        answer.logprobs.append(float(best.values))
    return answer


def compare(expected: list[Answer], found: list[Answer]) -> float:
    """Largest difference of log-probabilities; WrongResultError where it or a token is wrong."""
    worst = 0.0
    for index, (first, second) in enumerate(zip(expected, found, strict=True)):
        require(
            first.tokens == second.tokens,
            f"prompt {index}: tokens {second.tokens}, transformers gives {first.tokens}",
        )
        pairs = zip(first.logprobs, second.logprobs, strict=True)
        worst = max(worst, *(abs(one - other) for one, other in pairs))
    require(worst <= TOLERANCE, f"log-probabilities differ by {worst:.1e}")
    return worst

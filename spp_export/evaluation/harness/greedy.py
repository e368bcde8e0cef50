"""How far a row's greedy answer is the dense model's: tokens before the first other one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import nn

from spp_export.calibration.activations import input_device, token_batches
from spp_export.calibration.reading import TokenText, dialogue_text
from spp_export.common.options import WINDOW
from spp_export.common.progress import progress
from spp_export.evaluation.bootstrap import array, number, numbers, weighted_mean
from spp_export.evaluation.harness.generation import generate, model_stop_tokens
from spp_export.evaluation.harness.inputs import EvaluationText
from spp_export.evaluation.harness.measure import Opened, default_batch_tokens
from spp_export.evaluation.quality import documents_of, next_token_log_probabilities

_log = logging.getLogger(__name__)


class GreedyReference:
    """The dense model's greedy answers, of at most `tokens` tokens, to the prompts of a text as
    they were read: in the chat template, up to where the answer begins.

    They are made when the first row is compared with them, by `model`, which must then be as it
    was loaded.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, text: EvaluationText, tokens: int) -> None:
        self._model, self._tokenizer, self._tokens = model, tokenizer, tokens
        prompts = [prompt for one in text.read for prompt in _prompts(one)]
        self.prompts = [prompt for prompt in prompts if len(prompt) + tokens <= WINDOW]
        if left_out := len(prompts) - len(self.prompts):
            _log.warning(
                "prompts without a greedy answer: %d. With one of %d tokens they are longer than "
                "%d. Use fewer --answer-tokens.",
                left_out,
                tokens,
                WINDOW,
            )

    @cached_property
    def answers(self) -> list[TokenText]:
        """Each prompt and its greedy answer, with the token that ends it where it ends before."""
        stop = model_stop_tokens(self._model, self._tokenizer)
        with progress("answering greedily", len(self.prompts)) as advance_to:
            said = generate(
                self._model, self.prompts, self._tokens, stop, advance_to=advance_to, with_end=True
            )
        return [
            dialogue_text((*prompt, *ids), len(ids))
            for prompt, ids in zip(self.prompts, said, strict=True)
        ]

    def compare(self, opened: Opened, seed: int = 0) -> dict[str, Any]:
        """For the record: tokens of each answer, how many of them the row's greedy answer agrees
        on before the first difference, and the mean with its interval.

        A row's greedy answer is the dense model's as far as its likeliest token after every
        beginning of that answer is, so that one pass over the answer tells.
        """
        answers = self.answers
        agreed = torch.zeros(len(answers), dtype=torch.float64)
        with opened() as model, torch.no_grad():
            size = default_batch_tokens(input_device(model).type)
            batches = token_batches(self._tokenizer, answers, batch_tokens=size)
            with progress("comparing greedy answers", len(batches)) as advance_to:
                for done, batch in enumerate(batches, start=1):
                    log_p, targets = next_token_log_probabilities(model, batch)
                    same, of = (log_p.argmax(1) == targets).cpu(), documents_of(batch)
                    for document in of.unique().tolist():
                        agreed[document] = same[of == document].long().cumprod(0).sum()
                    advance_to(done)
        prompts = torch.ones_like(agreed)
        lengths = [float(sum(answer.answers[0])) for answer in answers if answer.answers]
        mean = weighted_mean(agreed.numpy(), prompts.numpy(), seed)
        return {
            "tokens": numbers(lengths),
            "agreed": numbers(agreed.tolist()),
            "summary": {
                "prompts": len(lengths),
                "tokens": number(float(array(lengths).mean())),
                "agreed": numbers(mean.to_list()),
            },
        }


def _prompts(text: TokenText) -> Iterator[tuple[int, ...]]:
    """What comes before the first answer of each run that has one."""
    for run, answers in zip(text.runs, text.answers or (), strict=False):
        if (begin := answers.find(1)) > 0:
            yield run[:begin]

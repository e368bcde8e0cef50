"""transformers, in batches: each step reads all weights once for all rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from spp_export.calibration.engines.base import Dense, Prompts
from spp_export.common.processes import answering
from spp_export.common.progress import progress, quiet_transformers
from spp_export.models.helpers import helpers_of
from spp_export.models.products import products
from spp_export.models.session import helped_session

if TYPE_CHECKING:
    from transformers import GenerationConfig

_ROWS = 32


def steps(questions: int, tokens: int) -> int:
    """How many steps so many answers of so many tokens take at most."""
    return -(-questions // _ROWS) * tokens


class Batches:
    """`generate` of transformers; questions of about one length are answered together."""

    version = "answers: sampled by transformers, v2"

    def suits(self, dense: Dense, prompts: Prompts) -> bool:
        """Everywhere."""
        return True

    def answers(self, dense: Dense, prompts: Prompts) -> list[list[int]]:
        """The answer to each question."""
        import torch
        from transformers import GenerationConfig

        helpers = helpers_of(dense.reader)
        helpers.ask(_answer_too, lambda: {"prompts": asdict(prompts)})
        questions, tokens, stop = prompts.questions, prompts.tokens, prompts.stop
        config = GenerationConfig(
            do_sample=True,
            max_new_tokens=tokens,
            eos_token_id=list(stop) or None,
            pad_token_id=stop[0] if stop else 0,
            **prompts.sampling,
        )
        order = sorted(range(len(questions)), key=lambda place: len(questions[place]))
        groups = [order[start : start + _ROWS] for start in range(0, len(order), _ROWS)]
        own = helpers.share(list(enumerate(groups)))
        said = torch.zeros((len(questions), tokens), dtype=torch.long)
        lengths = torch.zeros(len(questions), dtype=torch.long)
        with (
            torch.random.fork_rng(),
            torch.no_grad(),
            progress("answering prompts", len(own) * tokens) as advance_to,
        ):
            for done, (number, group) in enumerate(own):
                # What a group says is its own, whoever answers those before it.
                torch.manual_seed(prompts.seed + number)
                rows = [questions[place] for place in group]
                step = partial(_plus, advance_to, done * tokens)
                for place, row in zip(group, _continued(dense, rows, config, step), strict=True):
                    ended = prompts.ended(row)
                    said[place, : len(ended)] = torch.tensor(ended)
                    lengths[place] = len(ended)
                step(tokens)
        helpers.add([said, lengths])
        return [row[:end] for row, end in zip(said.tolist(), lengths.tolist(), strict=True)]


@answering
def _answer_too(opening: Mapping[str, Any], prompts: Mapping[str, Any]) -> None:
    Batches().answers(helped_session(opening), Prompts(**prompts))


def _plus(advance_to: Callable[[float], None], begun: int, steps: int) -> None:
    advance_to(begun + steps)


def _continued(
    dense: Dense,
    rows: Sequence[tuple[int, ...]],
    config: GenerationConfig,
    advance: Callable[[int], None],
) -> list[list[int]]:
    """What the model writes after each row; what comes after an end is padding."""
    import torch

    from spp_export.calibration.activations import input_device

    model, width = dense.reader, max(map(len, rows))
    ids = torch.full((len(rows), width), config.pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, question in enumerate(rows):
        # Padding on the left, so that the answers of all rows begin at one place.
        ids[row, width - len(question) :] = torch.tensor(question)
        mask[row, width - len(question) :] = 1

    def count(written: torch.Tensor, _scores: object, **_: object) -> torch.Tensor:
        advance(written.shape[1] - width)
        return torch.zeros(len(written), dtype=torch.bool, device=written.device)

    device = input_device(model)
    with quiet_transformers(), products(device.type):
        generate: Any = model.generate
        written = generate(
            ids.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
            stopping_criteria=[count],
        )
    answers: list[list[int]] = written[:, width:].tolist()
    return answers

"""The texts that rows are judged on; none of them may have chosen or fitted anything."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from spp_export.common.errors import UsageError
from spp_export.data.pools import read_pools
from spp_export.data.scenario import MIN_PROMPTS_TO_HOLD_OUT, Scenario

HELD_OUT = "scenario, held out"


@dataclass(frozen=True)
class EvaluationText:
    """A named list of documents; a document is the unit that intervals resample."""

    name: str
    documents: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Of the documents, in order."""
        return hashlib.sha256(json.dumps(self.documents).encode()).hexdigest()


def held_out_text(scenario: Scenario) -> EvaluationText:
    """The scenario's held-out prompts; UsageError for a scenario too short to hold any out."""
    _, held_out = scenario.split()
    if not held_out:
        raise UsageError(
            f"scenario {scenario.name}: holds {len(scenario.prompts)} prompts, and it takes at "
            f"least {MIN_PROMPTS_TO_HOLD_OUT} to keep some for judging. Give it more."
        )
    return EvaluationText(HELD_OUT, held_out)


def pool_texts(
    directory: str | os.PathLike[str], domains: Sequence[str] | None = None
) -> tuple[EvaluationText, ...]:
    """The validation pool of each domain; of every one in the directory without `domains`."""
    pools = read_pools(directory, domains)
    return tuple(
        EvaluationText(f"{name} pool", documents)
        for name, documents in zip(pools.domains, pools.val, strict=True)
    )


def conversation_text(scenario: Scenario) -> EvaluationText:
    """An evaluation set as text: one document per conversation, answers after their prompts."""
    return EvaluationText(scenario.name, tuple(_conversations(scenario)))


def _conversations(scenario: Scenario) -> Iterator[str]:
    if not scenario.turns:
        yield from scenario.prompts
        return
    for _, turns in groupby(scenario.turns, key=lambda turn: turn.session):
        yield "\n\n".join(
            turn.prompt if turn.answer is None else f"{turn.prompt}\n{turn.answer}"
            for turn in turns
        )

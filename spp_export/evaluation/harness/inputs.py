"""The texts of an evaluation, and the check that nothing was calibrated on them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from spp_export.common.errors import UsageError
from spp_export.data.artifacts import Artifacts
from spp_export.data.pools import read_pools
from spp_export.data.scenario import MIN_PROMPTS_TO_HOLD_OUT, Scenario, read_scenario

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


PathLike = str | os.PathLike[str]
_EXCERPT = 60


@dataclass(frozen=True)
class Inputs:
    """What was read: the scenario, another one for control, evaluation sets, and the texts to judge
    on, the scenario's held-out prompts first."""

    scenario: Scenario
    wrong: Scenario | None
    eval_sets: tuple[Scenario, ...]
    texts: tuple[EvaluationText, ...]

    def check_unseen(self, artifacts: Iterable[Artifacts]) -> None:
        """UsageError where a document is one that calibrated the scenario's rows."""
        calibration, _ = self.scenario.split()
        seen = {_words(prompt): "the scenario's calibration prompts" for prompt in calibration}
        for source in artifacts:
            seen |= {
                _words(text): f"the artifacts' {name} pool" for name, text in source.calibration
            }
        for text in self.texts:
            for document in self._pieces(text):
                if place := seen.get(_words(document)):
                    raise UsageError(
                        f"text {text.name}: {document[:_EXCERPT]!r} is among {place}, so it cannot "
                        "judge them. Leave it out."
                    )

    def check_answers(self) -> None:
        """UsageError unless there are evaluation sets and each holds answers."""
        if not self.eval_sets:
            raise UsageError("--generate answers evaluation sets: give --eval-set FILE.")
        for evaluation_set in self.eval_sets:
            if all(turn.answer is None for turn in evaluation_set.turns):
                raise UsageError(
                    f"--eval-set {evaluation_set.name}: holds no answer, so --generate has none "
                    "to compare with."
                )

    def _pieces(self, text: EvaluationText) -> Iterable[str]:
        """Documents, and of conversations the prompts that they are made of."""
        yield from text.documents
        for evaluation_set in self.eval_sets:
            if evaluation_set.name == text.name:
                yield from evaluation_set.prompts


def read_inputs(
    scenario: PathLike,
    wrong: PathLike | None,
    eval_sets: Sequence[PathLike],
    pools: PathLike | None,
    domains: Sequence[str],
) -> Inputs:
    """Read every text; UsageError where names collide or domains have no pools."""
    if domains and pools is None:
        raise UsageError("--domain needs the directory that holds its pool: give --pools DIR.")
    own = read_scenario(scenario)
    sets = tuple(read_scenario(path) for path in eval_sets)
    texts = [held_out_text(own)]
    if pools is not None:
        texts += pool_texts(pools, domains or None)
    texts += [conversation_text(evaluation_set) for evaluation_set in sets]
    names = [text.name for text in texts]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two texts to judge on are named {name}. Rename a file.")
    other = None if wrong is None else read_scenario(wrong)
    if other is not None and other.sha256 == own.sha256:
        raise UsageError(f"--wrong {other.name}: is the scenario itself. Give another one.")
    return Inputs(own, other, sets, tuple(texts))


def _words(text: str) -> str:
    return " ".join(text.split())

"""The texts of an evaluation, and the check that none of them had a say in what is judged."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from spp_export.common.errors import UsageError
from spp_export.data.artifacts import Artifacts
from spp_export.data.scenario import Scenario, read_scenario
from spp_export.evaluation.harness.texts import (
    EvaluationText,
    conversation_text,
    held_out_text,
    pool_texts,
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
        for each in artifacts:
            seen |= {_words(text): f"the artifacts' {name} pool" for name, text in each.calibration}
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
        for each in self.eval_sets:
            if all(turn.answer is None for turn in each.turns):
                raise UsageError(
                    f"--eval-set {each.name}: holds no answer, so --generate has none "
                    "to compare with."
                )

    def _pieces(self, text: EvaluationText) -> Iterable[str]:
        """Documents, and of conversations the prompts that they are made of."""
        yield from text.documents
        for each in self.eval_sets:
            if each.name == text.name:
                yield from each.prompts


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
    found = read_scenario(scenario)
    sets = tuple(read_scenario(path) for path in eval_sets)
    texts = [held_out_text(found)]
    if pools is not None:
        texts += pool_texts(pools, domains or None)
    texts += [conversation_text(each) for each in sets]
    names = [text.name for text in texts]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two texts to judge on are named {name}. Rename a file.")
    other = None if wrong is None else read_scenario(wrong)
    if other is not None and other.sha256 == found.sha256:
        raise UsageError(f"--wrong {other.name}: is the scenario itself. Give another one.")
    return Inputs(found, other, sets, tuple(texts))


def _words(text: str) -> str:
    return " ".join(text.split())

"""The texts of an evaluation, and the check that nothing was calibrated on them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from spp_export.calibration.answers import Answering, read_traffic, say_what_is_otherwise
from spp_export.calibration.reading import TokenText, spread_whole, token_texts
from spp_export.common.errors import UsageError
from spp_export.data.answer_file import with_answers
from spp_export.data.artifacts import Artifacts
from spp_export.data.conversation import Conversation, plain
from spp_export.data.duplicates import shared_texts
from spp_export.data.pools import read_pools
from spp_export.data.scenario import MIN_PROMPTS_TO_HOLD_OUT, Scenario, read_scenario
from spp_export.models.session import Session

HELD_OUT = "scenario, held out"


@dataclass(frozen=True)
class EvaluationText:
    """A named list of documents; a document is the unit that intervals resample.

    tokens: how many are read, and of how many of the text. read: the documents as the model reads
    them, prompts with its answers. Both are known once the text was read.
    """

    name: str
    documents: tuple[Conversation, ...]
    tokens: Mapping[str, int] | None = None
    read: tuple[TokenText, ...] = ()

    @property
    def sha256(self) -> str:
        """Of the documents, in order, with the answers that are given to them."""
        content = [
            [*((m.role, m.text) for m in document.messages), *document.given]
            for document in self.documents
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def held_out_text(scenario: Scenario) -> EvaluationText:
    """The scenario's held-out part; UsageError for a scenario too short to hold any out."""
    _, held_out = scenario.split()
    if not held_out:
        raise UsageError(
            f"scenario {scenario.name}: holds {scenario.distinct} prompts that are not alike, and "
            f"it takes at least {MIN_PROMPTS_TO_HOLD_OUT} to keep some for judging. Give it more."
        )
    return EvaluationText(HELD_OUT, held_out)


def pool_texts(
    directory: str | os.PathLike[str], domains: Sequence[str] | None = None
) -> tuple[EvaluationText, ...]:
    """The validation pool of each domain; of every one in the directory without `domains`."""
    pools = read_pools(directory, domains)
    return tuple(
        EvaluationText(f"{name} pool", tuple(map(plain, documents)))
        for name, documents in zip(pools.domains, pools.val, strict=True)
    )


def conversation_text(scenario: Scenario) -> EvaluationText:
    """An evaluation set as text: one document per conversation, answers after their prompts."""
    return EvaluationText(scenario.name, tuple(_conversations(scenario)))


def _conversations(scenario: Scenario) -> Iterator[Conversation]:
    if not scenario.turns:
        yield from scenario.conversations
        return
    sessions = groupby(scenario.turns, key=lambda turn: turn.session)
    written = {
        session: "\n\n".join(
            turn.prompt if turn.answer is None else f"{turn.prompt}\n{turn.answer}"
            for turn in turns
        )
        for session, turns in sessions
    }
    for session, conversation in enumerate(scenario.conversations):
        yield conversation if conversation.chat else plain(written[session])


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
        """UsageError where a document is one that rows are calibrated on, holds it or is in it."""
        seen = [("the scenario's calibration prompts", _contents(self.scenario.split()[0]))]
        for source in artifacts:
            for domain in source.domains:
                pool = [text for name, text in source.calibration if name == domain]
                seen.append((f"the artifacts' {domain} pool", pool))
        if self.wrong is not None:
            seen.append(
                (f"the prompts of --wrong {self.wrong.name}", _contents(self.wrong.split()[0]))
            )
        for text in self.texts:
            documents = _contents(text.documents)
            for place, texts in seen:
                if shared := shared_texts(documents, texts):
                    raise UsageError(
                        f"text {text.name}: {len(shared)} of its {len(documents)} documents are "
                        f"among {place}, such as {documents[shared[0]][:_EXCERPT]!r}, so they "
                        "cannot judge them. Leave them out."
                    )

    def within(self, session: Session, limit: int, answering: Answering) -> Inputs:
        """Every text as far as it is read: all, or whole documents spread evenly over one that has
        more than `limit` tokens; prompts with the dense model's answers."""
        texts = (_within(session, text, limit, answering) for text in self.texts)
        return replace(self, texts=tuple(texts))

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


def read_inputs(
    scenario: PathLike,
    wrong: PathLike | None,
    eval_sets: Sequence[PathLike],
    pools: PathLike | None,
    domains: Sequence[str],
    *,
    answers: PathLike | None = None,
) -> Inputs:
    """Read every text, the scenario with the answers of a file; UsageError where names collide or
    domains have no pools."""
    if domains and pools is None:
        raise UsageError("--domain needs the directory that holds its pool: give --pools DIR.")
    own = with_answers(read_scenario(scenario), answers)
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


def _within(
    session: Session, text: EvaluationText, limit: int, answering: Answering
) -> EvaluationText:
    lengths = [document.tokens for document in token_texts(session.tokenizer, text.documents)]
    kept = [text.documents[place] for place in spread_whole(lengths, limit)]
    # Documents that are kept are read whole, however long their answers make them.
    reading = read_traffic(session, kept, 2 * max(limit, sum(lengths)), answering)
    say_what_is_otherwise([reading], answering)
    return replace(text, documents=tuple(kept), tokens=reading.to_dict(), read=reading.texts)


def _contents(conversations: Iterable[Conversation]) -> list[str]:
    return [conversation.content for conversation in conversations]

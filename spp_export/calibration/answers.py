"""The answers of the dense model: what a slim one will have to say.

Text of prompts alone is not what a deployed model works on: it reads them in its chat template, and
spends its time on answers. Where a conversation has none, the dense model gives them, sampled as
its generation config says, and they are kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from spp_export.calibration.cache import is_whole, model_key, read, write
from spp_export.calibration.engines import (
    AnswerEngine,
    Dense,
    EngineFailed,
    Prompts,
    engines_at_hand,
)
from spp_export.calibration.reading import (
    Reading,
    ScenarioText,
    TokenText,
    dialogue_text,
    question_ids,
    read_texts,
    spread,
    spread_whole,
    token_texts,
)
from spp_export.calibration.stored import ANSWERS, trim
from spp_export.common.options import DEFAULT_ANSWER_TOKENS, WINDOW
from spp_export.data.conversation import Conversation
from spp_export.data.scenario import Scenario
from spp_export.models.checkpoint.companions import GENERATION_CONFIG, companion_object
from spp_export.models.hub import cache_directory
from spp_export.models.session import Session
from spp_export.models.stop_tokens import stop_tokens

# Beyond so many conversations, more of them change little.
MOST = 128
_log = logging.getLogger(__name__)
_SAMPLING = ("temperature", "top_p", "top_k")


@dataclass(frozen=True)
class Answering:
    """Answers of at most so many tokens, drawn by a seed, to at most so many prompts; none of 0
    tokens."""

    tokens: int = DEFAULT_ANSWER_TOKENS
    seed: int = 0
    most: int = MOST


def scenario_traffic(
    session: Session, scenario: Scenario, limit: int, answering: Answering
) -> ScenarioText:
    """Both parts of a scenario as `read_traffic` reads them; made once in a session."""
    key = ("scenario traffic", scenario, limit, answering)
    if key not in session.remembered:
        parts = [read_traffic(session, part, limit, answering) for part in scenario.split()]
        session.remembered[key] = ScenarioText(*parts)
        if answering.tokens and session.reads_from_disk and _asks(scenario):
            _log.warning(
                "prompts are read without answers: the model runs from disk, and would be read "
                "again for every token. Give conversations with answers, or --answers FILE."
            )
        say_what_is_otherwise(parts, answering)
    traffic: ScenarioText = session.remembered[key]
    return traffic


def _asks(scenario: Scenario) -> bool:
    """Whether any prompt is without an answer."""
    return any(not part.answered for one in scenario.conversations for part in one.dialogues)


def say_what_is_otherwise(parts: Sequence[Reading], answering: Answering) -> None:
    """Nothing is left out, or read in another way, without a word."""
    if unasked := sum(part.unasked for part in parts):
        _log.warning(
            "prompts that are not read: %d. At most %d of each part are answered, spread evenly.",
            unasked,
            answering.most,
        )
    if documents := sum(part.documents for part in parts):
        _log.warning(
            "prompts that are read as text, without answers: %d. With an answer of %d tokens they "
            "are longer than %d. Use fewer --answer-tokens, or give conversations with answers.",
            documents,
            answering.tokens,
            WINDOW,
        )
    if untold := sum(part.untold for part in parts):
        _log.warning(
            "conversations that count whole, and not their answers alone: %d. The model's chat "
            "template writes what was said in another form.",
            untold,
        )


def answer(
    dense: Dense, questions: Sequence[tuple[int, ...]], tokens: int, seed: int
) -> list[TokenText]:
    """Each question, token ids up to where an answer begins, and the dense model's answer to it of
    at most so many tokens, with the token that ends it where it ends before; from the cache or by
    the fastest engine at hand.
    """
    source = dense.source
    stored = companion_object(source.path, GENERATION_CONFIG)
    stop = stop_tokens(stored, source.config, dense.tokenizer)
    asked = Prompts(questions, tokens, seed, _sampling(stored), stop)
    answers = _answers(dense, asked)
    return [
        dialogue_text((*ids, *said), len(said))
        for ids, said in zip(questions, answers, strict=True)
    ]


def _answers(dense: Dense, asked: Prompts) -> list[list[int]]:
    *engines, last = engines_at_hand(dense, asked)
    for engine in engines:
        try:
            return _by(engine, dense, asked)
        except EngineFailed as failure:
            _log.warning("%s. The next fastest engine answers prompts.", failure)
    return _by(last, dense, asked)


def _by(engine: AnswerEngine, dense: Dense, asked: Prompts) -> list[list[int]]:
    source = dense.source
    options = asked.sampling, asked.tokens, asked.seed, asked.questions
    decided = [engine.version, *model_key(source), dense.dtype, *options]
    key = hashlib.sha256(json.dumps(decided).encode()).hexdigest()
    path = cache_directory() / ANSWERS / f"{key[:32]}.safetensors"
    answers = _kept(path)
    if answers is None:
        answers = engine.answers(dense, asked)
        _keep(path, answers, source.name)
    return answers


def _keep(path: Path, answers: Sequence[Sequence[int]], model: str) -> None:
    said = [id_ for ids in answers for id_ in ids]
    lengths = np.array([len(ids) for ids in answers], dtype=np.int32)
    write(path, {"ids": np.array(said, dtype=np.int32), "lengths": lengths}, model)
    trim()


def _kept(path: Path) -> list[list[int]] | None:
    """Answers of an earlier run."""
    if not is_whole(path, ("ids", "lengths")):
        return None
    ends = np.cumsum(read(path, "lengths"))[:-1]
    return [ids.tolist() for ids in np.split(read(path, "ids"), ends)]


def _sampling(stored: Mapping[str, Any]) -> dict[str, Any]:
    """How tokens are drawn: as the model's generation config says; where it does not sample, from
    the model's own distribution, for greedy answers repeat themselves and say little."""
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    if not stored.get("do_sample"):
        return plain
    return {name: stored.get(name) or plain[name] for name in _SAMPLING}


def read_traffic(
    session: Session,
    conversations: Sequence[Conversation],
    limit: int,
    answering: Answering,
) -> Reading:
    """What a deployed model will read and write: conversations that tell what the assistant said as
    they are, and prompts with the dense model's answers.

    Of more than `limit` tokens, or more than `answering.most` conversations, some are read, spread
    evenly. Prompts that leave no room for an answer are documents, and are read as text; so are all
    where there are to be no answers.
    """
    tokens = answering.tokens
    if not tokens or session.reads_from_disk:
        known = [
            part if part.answered else replace(part, chat=one.chat)
            for one in conversations
            for part in (one.dialogues if one.given else (one,))
        ]
        return read_texts(session.tokenizer, known, limit)
    dialogues = [part for one in conversations for part in one.dialogues]
    told = token_texts(session.tokenizer, [part for part in dialogues if part.answered])
    open_ = [part for part in dialogues if not part.answered]
    questions = question_ids(session.tokenizer, open_)
    short = [ids for ids in questions if len(ids) + tokens <= WINDOW]
    long = [TokenText((ids,)) for ids in questions if len(ids) + tokens > WINDOW]
    evenly = spread([1] * len(short), answering.most)
    lengths = [len(short[place]) + tokens for place in evenly]
    chosen = [short[evenly[place]] for place in spread_whole(lengths, limit)] if lengths else []
    answered = answer(session, chosen, tokens, answering.seed) if chosen else []
    read = read_texts(session.tokenizer, [*answered, *told, *long], limit)
    unread = sum(map(len, short)) - sum(map(len, chosen))
    return replace(
        read,
        available=read.available + unread,
        unasked=len(short) - len(chosen),
        documents=len(long),
        untold=sum(text.answers is None for text in told),
    )

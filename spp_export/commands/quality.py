"""What quantising costs, measured on text: the same for every command that writes or checks it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spp_export.calibration.answers import read_traffic, say_what_is_otherwise
from spp_export.calibration.reading import Text, read_texts
from spp_export.common.errors import QualityError, SppError
from spp_export.common.options import DEFAULT_CALIBRATION_TOKENS
from spp_export.data.conversation import Conversation, Message
from spp_export.data.scenario import Scenario
from spp_export.evaluation.remarks import NOTICEABLE_KL, Wanted
from spp_export.models.checkpoint.checkpoint import Checkpoint
from spp_export.models.hub import stored_model
from spp_export.models.session import Session, open_session
from spp_export.planning import Plan
from spp_export.planning.request import PlanRequest
from spp_export.slicing.compensation import calibration_tokens, plan_answering

if TYPE_CHECKING:
    from torch import nn

    from spp_export.evaluation.quality import Quality

_log = logging.getLogger(__name__)
_CONVERSATIONS = Path(__file__).parents[1] / "data" / "assets" / "conversations.jsonl"
DEFAULT_TEXT = "default conversations"
DEFAULT_ANSWERS = "answers to the prompts of default conversations"
_WHOLE_SCENARIO, _WHOLE_ANSWERS = "text of the scenario", "answers to prompts of the scenario"


def judged_texts(
    dense: Session | None, scenario: Scenario | None, plan: Plan
) -> tuple[Sequence[Text], str]:
    """Text that the plan was not made of, as an export reads it, and what it is.

    Of the scenario that the plan was made of, what was held out; of any other, all. An export keeps
    only a hash of its scenario, so without one these are conversations that come with spp.

    Prompts have the dense model's own answers, of the length that the plan says. Where `dense` is
    None or runs from disk, or the plan says none, prompts are text, and the conversations that come
    with spp keep their own answers.
    """
    from spp_export.evaluation.quality import ANSWERS, HELD_OUT

    answering, limit = plan_answering(plan, PlanRequest()), calibration_tokens(plan, PlanRequest())
    answers = dense is not None and answering.tokens > 0 and not dense.reads_from_disk
    conversations: Sequence[Conversation]
    if scenario is not None and plan.scenario.get("sha256") != scenario.sha256:
        conversations = scenario.conversations
        names = _WHOLE_SCENARIO, _WHOLE_ANSWERS
    elif scenario is not None and (held_out := scenario.split()[1]):
        conversations = held_out
        names = HELD_OUT, ANSWERS
    else:
        conversations = _default_prompts() if answers else default_texts()
        names = DEFAULT_TEXT, DEFAULT_ANSWERS if answers else DEFAULT_TEXT
    if dense is None or not answers:
        return conversations, names[any(one.answered for one in conversations)]
    read = read_traffic(dense, conversations, limit, answering)
    say_what_is_otherwise([read], answering)
    return read.texts, names[any(text.answers is not None for text in read.texts)]


def dense_at_hand(checkpoint: Checkpoint, plan: Plan) -> Session | None:
    """The dense model of a checkpoint's plan: the checkpoint itself where nothing was removed, or
    what this machine has of the plan's model. It is not loaded yet, and nothing is fetched."""
    if checkpoint.fingerprint == plan.model_fingerprint:
        return open_session(os.fspath(checkpoint.path), layerwise=None)
    place = stored_model(plan.model_source)
    if place is None:
        return None
    try:
        session = open_session(os.fspath(place), layerwise=None)
    except SppError:  # what is left of a download that was cut off
        return None
    return session if session.source.fingerprint == plan.model_fingerprint else None


def _default_prompts() -> list[Conversation]:
    return [replace(one, messages=one.messages[:1]) for one in default_texts()]


def default_texts() -> tuple[Conversation, ...]:
    """Conversations of all kinds."""
    turns = map(json.loads, _CONVERSATIONS.read_text(encoding="utf-8").splitlines())
    return tuple(
        Conversation(
            (Message("user", turn["prompt"]), Message("assistant", turn["answer"])), chat=True
        )
        for turn in turns
    )


def measure_file(
    reference: nn.Module,
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Text],
    source: str,
    limit: int = DEFAULT_CALIBRATION_TOKENS,
) -> Quality | None:
    """Quality of the model in a file beside the one it is compared with, on at most `limit` tokens
    of texts that `source` names, such as those of `judged_texts`."""
    from spp_export.evaluation.quality import measure_quality

    read = read_texts(tokenizer, texts, limit).texts
    return measure_quality(reference, model, tokenizer, read, source)


def record_quality(
    content: dict[str, Any], name: str, quality: Quality | None, wanted: Wanted
) -> tuple[dict[str, Any], QualityError | None]:
    """verify.json's content with a quality under `name`, and the error where it is beyond the
    limit."""
    content[name] = quality.to_dict() if quality else None
    failure = gate(quality, wanted)
    if wanted.given:
        content["distance_gate"] = {**wanted.to_dict(), "passed": failure is None}
        content["passed"] = content["passed"] and failure is None
    return content, failure


def gate(quality: Quality | None, wanted: Wanted) -> QualityError | None:
    """The error for a model that is further off than wanted; else a warning where users will
    notice."""
    if quality is None:
        if not wanted.given:
            return None
        flags = " and ".join(wanted.given)
        return QualityError(f"{flags}: there is no text to measure on. Add --scenario FILE.")
    figure = f"mean KL is {quality.mean_kl:.3g} nats on {quality.tokens:,} tokens"
    figure += f" ({quality.source})"
    if not wanted.held_by(quality.mean_kl, quality.top1):
        return QualityError(
            f"{figure}, same token {quality.top1:.1%}; {wanted.words} is not held. Keep more, use "
            "more bits, or ask for less."
        )
    if not quality.mean_kl < NOTICEABLE_KL:
        _log.warning(
            "%s: answers will differ noticeably. --max-kl refuses what is worse than you allow.",
            figure,
        )
    return None

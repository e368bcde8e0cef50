"""What quantising costs, measured on text: the same for every command that writes or checks it."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spp_export.calibration.reading import Text, read_texts
from spp_export.common.errors import QualityError
from spp_export.common.options import DEFAULT_CALIBRATION_TOKENS
from spp_export.data.conversation import Conversation, Message
from spp_export.data.scenario import Scenario
from spp_export.evaluation.remarks import NOTICEABLE_KL, Wanted
from spp_export.planning import Plan

if TYPE_CHECKING:
    from torch import nn

    from spp_export.evaluation.quality import Quality

_log = logging.getLogger(__name__)
_CONVERSATIONS = Path(__file__).parents[1] / "data" / "assets" / "conversations.jsonl"
DEFAULT_TEXT = "default conversations"
_WHOLE_SCENARIO = "text of the scenario"


def judged_texts(
    scenario: Scenario | None, plan: Plan | None
) -> tuple[Sequence[Conversation], str]:
    """Text that the plan was not made of, and what it is.

    Of the scenario that the plan was made of, what was held out; of any other, all. An export keeps
    only a hash of its scenario, so without one these are conversations that come with spp, in the
    model's chat template where it has one.
    """
    from spp_export.evaluation.quality import HELD_OUT

    if scenario is not None and (plan is None or plan.scenario.get("sha256") != scenario.sha256):
        return scenario.conversations, _WHOLE_SCENARIO
    if scenario is not None and (held_out := scenario.split()[1]):
        return held_out, HELD_OUT
    return default_texts(), DEFAULT_TEXT


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

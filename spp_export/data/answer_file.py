"""A chat log with the answers to a scenario's prompts."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from spp_export.common.errors import ScenarioError
from spp_export.data.conversation import Conversation
from spp_export.data.duplicates import normalised
from spp_export.data.scenario import AnswersRecord, Scenario, read_scenario

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnswerFile:
    """Answers by the `normalised` text of what they answer, the file's name and its SHA-256."""

    name: str
    sha256: str
    answers: Mapping[str, str]

    def given_to(self, conversation: Conversation) -> Conversation:
        """A conversation with the answers that are here to what it asks, unless it has its own."""
        if conversation.answered:
            return conversation
        asked = conversation.questions
        found = tuple(self.answers.get(normalised(question.content)) for question in asked)
        return replace(conversation, given=found) if any(found) else conversation


def read_answers(path: str | os.PathLike[str]) -> AnswerFile:
    """The answers in a file of any format of a scenario, of conversations that go on the first one.

    Where a prompt is answered twice, the first answer counts. Raises ScenarioError for a file that
    is no scenario, or that holds no answer.
    """
    log = read_scenario(path, what="answers")
    answers: dict[str, str] = {}
    for conversation in log.conversations:
        if conversation.answered:
            asked, answer = _first_answer(conversation)
            answers.setdefault(asked, answer)
    chats = {i for i, conversation in enumerate(log.conversations) if conversation.chat}
    for turn in log.turns:
        if turn.session not in chats and turn.answer and turn.answer.strip():
            answers.setdefault(normalised(turn.prompt), turn.answer)
    if not answers:
        raise ScenarioError(
            f"answers {os.fspath(path)}: holds no answer. Expected records such as "
            '{"prompt": "...", "completion": "..."}, or a chat log.'
        )
    return AnswerFile(log.name, log.sha256, answers)


def _first_answer(conversation: Conversation) -> tuple[str, str]:
    """What a conversation asks first, normalised, and what the assistant says to it."""
    messages = conversation.messages
    place = next(i for i, message in enumerate(messages) if message.role == "assistant")
    asked = Conversation(messages[:place], chat=True)
    return normalised(asked.content), messages[place].text


def with_answers(
    scenario: Scenario, path: str | os.PathLike[str] | None, *, required: bool = True
) -> Scenario:
    """A scenario with the answers that a file has to those of its prompts that have none of their
    own, where a file is given; a line says how many have none there either.

    Raises ScenarioError where it is `required` and the file answers none of them.
    """
    if path is None:
        return scenario
    file = read_answers(path)
    conversations = tuple(map(file.given_to, scenario.conversations))
    asked = [part for one in conversations if not one.answered for part in one.dialogues]
    answered = sum(part.answered for part in asked)
    if required and not answered:
        raise ScenarioError(
            f"answers {os.fspath(path)}: its {len(file.answers)} answers are to none of the "
            f"{len(asked)} prompts of {scenario.name} that have no answer yet. Give a log in which "
            "the same prompts are asked."
        )
    if answered < len(asked):
        _log.warning(
            "prompts of %s without an answer in %s: %d of %d. The dense model answers them.",
            scenario.name,
            file.name,
            len(asked) - answered,
            len(asked),
        )
    record = AnswersRecord(file.name, file.sha256, answered)
    return replace(scenario, conversations=conversations, answers=record)

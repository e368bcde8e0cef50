"""What a scenario is made of: who says what."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Message:
    """What one side says; `role` is "system", "user", "assistant" or "tool"."""

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """What belongs together, and is never split between calibration and held-out text.

    `chat` says that the file tells who speaks, so that the model's chat template writes it; else
    every message is a text by itself, as it stands. `given` are the answers that another file has
    to its `questions`, in order, None where it has none; all without any.
    """

    messages: tuple[Message, ...]
    chat: bool = False
    given: tuple[str | None, ...] = ()

    @property
    def prompts(self) -> tuple[str, ...]:
        """What the user says."""
        return tuple(message.text for message in self._from_users)

    @property
    def _from_users(self) -> tuple[Message, ...]:
        return tuple(message for message in self.messages if message.role == "user")

    @property
    def answered(self) -> bool:
        """Whether it tells what the assistant says."""
        return self.chat and any(message.role == "assistant" for message in self.messages)

    @property
    def questions(self) -> tuple[Conversation, ...]:
        """What an assistant would be asked: the whole of a chat, each text by itself otherwise;
        with the answers that are given."""
        asked = [self.messages] if self.chat else [(message,) for message in self._from_users]
        answers = self.given or (None,) * len(asked)
        return tuple(
            Conversation(
                messages if answer is None else (*messages, Message("assistant", answer)), chat=True
            )
            for messages, answer in zip(asked, answers, strict=True)
        )

    @property
    def dialogues(self) -> tuple[Conversation, ...]:
        """Itself where it tells what the assistant says, else its questions."""
        return (self,) if self.answered else self.questions

    @property
    def content(self) -> str:
        """All that is said, by which conversations are compared; but what the model was told to be
        is the same for many of them, and counts only where there is nothing else."""
        texts = [message.text for message in self.messages if message.role != "system"]
        return "\n".join(texts or [message.text for message in self.messages])


def plain(text: str) -> Conversation:
    """A text that is read as it stands."""
    return Conversation((Message("user", text),))


@dataclass(frozen=True, slots=True)
class Turn:
    """One question of a file that has structure, with what is known of it.

    `session` counts conversations from 0. `answer` is the reference answer, or what the assistant
    said next, where there is one.
    """

    session: int
    prompt: str
    answer: str | None = None
    task_type: str | None = None

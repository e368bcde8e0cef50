"""From conversations to token ids: the one place where text meets a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from spp_export.common.errors import ScenarioError
from spp_export.common.options import WINDOW
from spp_export.data.conversation import Conversation, Message
from spp_export.data.pools import Pools
from spp_export.data.scenario import Scenario

if TYPE_CHECKING:
    from spp_export.models.session import Session


# Texts that are given to a tokenizer together: its records of each take far more than the ids.
_TOGETHER = 1000
_DATE = "01 Jan 2026"


@dataclass(frozen=True)
class TokenText:
    """What is read of a text, as token ids: runs, each from a beginning of its own."""

    runs: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """How many there are."""
        return sum(map(len, self.runs))

    def pieces(self, window: int) -> Iterator[tuple[int, ...]]:
        """The runs, those of more than `window` tokens cut after every `window` of them."""
        for run in self.runs:
            for start in range(0, len(run), window):
                yield run[start : start + window]

    def beginning(self, count: int) -> TokenText:
        """The first tokens, at most `count`, of the first run that has any."""
        return TokenText(tuple(run[:count] for run in self.runs if run)[:1])


# A string is read as it stands.
Text = str | Conversation | TokenText


def token_texts(tokenizer: Any, texts: Sequence[Text]) -> list[TokenText]:
    """The token ids of each text, with the tokenizer's special tokens or, of chats, those that its
    chat template writes.

    Raises ScenarioError for a chat that the template does not take.
    """
    written = [_written(tokenizer, text) for text in texts]
    runs = _encoded(tokenizer, [string for strings in written for string in strings])
    return [
        text if isinstance(text, TokenText) else TokenText(tuple(next(runs) for _ in strings))
        for text, strings in zip(texts, written, strict=True)
    ]


class _Templated(str):
    """What a chat template wrote, special tokens included."""

    __slots__ = ()


def _written(tokenizer: Any, text: Text) -> tuple[str, ...]:
    """The strings that a text is, each read from its own beginning."""
    if isinstance(text, TokenText):
        return ()
    if isinstance(text, str):
        return (text,)
    return (chat_text(tokenizer, text),) if text.chat else text.prompts


def chat_text(tokenizer: Any, conversation: Conversation) -> str:
    """A conversation as the model's chat template writes it; without one, what is said, with blank
    lines between.

    Many templates know users and assistants in turn, and no other role. For them the system's
    message begins the user's first one, a tool speaks as the user does, and messages in a row of
    one role are one. Raises ScenarioError where that does not do either.
    """
    if not getattr(tokenizer, "chat_template", None):
        return "\n\n".join(message.text for message in conversation.messages)
    reason = ""
    for messages in (conversation.messages, _in_turn(conversation.messages)):
        written = [{"role": message.role, "content": message.text} for message in messages]
        try:
            # The date is in some templates: the same text every day.
            return _Templated(
                tokenizer.apply_chat_template(written, tokenize=False, date_string=_DATE)
            )
        except Exception as error:  # whatever the author of a template thought of
            reason = (str(error).splitlines() or [type(error).__name__])[0]
    first = " ".join(conversation.messages[0].text.split())
    raise ScenarioError(
        f"the conversation that begins {first[:60]!r} does not fit the model's chat template "
        f"({reason:.120}). Leave it out."
    )


def _in_turn(messages: Sequence[Message]) -> list[Message]:
    alternating: list[Message] = []
    for message in messages:
        role = "assistant" if message.role == "assistant" else "user"
        if alternating and alternating[-1].role == role:
            alternating[-1] = Message(role, f"{alternating[-1].text}\n\n{message.text}")
        else:
            alternating.append(Message(role, message.text))
    return alternating


def _encoded(tokenizer: Any, strings: Sequence[str]) -> Iterator[tuple[int, ...]]:
    for start in range(0, len(strings), _TOGETHER):
        some = strings[start : start + _TOGETHER]
        for templated, group in groupby(some, key=lambda text: isinstance(text, _Templated)):
            options = {"add_special_tokens": False} if templated else {}
            # Not verbose: the tokenizer warns of what is longer than the model's context.
            yield from map(
                tuple, tokenizer(list(map(str, group)), verbose=False, **options)["input_ids"]
            )


@dataclass(frozen=True)
class Reading:
    """What is read of a list of texts: `tokens` of the `available` ones."""

    texts: tuple[TokenText, ...]
    tokens: int
    available: int

    def to_dict(self) -> dict[str, int]:
        """For plan.json and `--json`."""
        return {"read": self.tokens, "of": self.available}


def read_texts(tokenizer: Any, texts: Sequence[Text], limit: int) -> Reading:
    """All of the texts, or windows spread evenly over them where they have more than `limit`
    tokens; texts of which nothing is read are left out. `limit` is at least a window."""
    encoded = token_texts(tokenizer, texts)
    available = sum(text.tokens for text in encoded)
    if available <= limit:
        return Reading(tuple(encoded), available, available)
    pieces = [(i, piece) for i, text in enumerate(encoded) for piece in text.pieces(WINDOW)]
    runs: dict[int, list[tuple[int, ...]]] = {}
    for place in spread([len(piece) for _, piece in pieces], limit):
        index, piece = pieces[place]
        runs.setdefault(index, []).append(piece)
    read = tuple(TokenText(tuple(of_text)) for of_text in runs.values())
    return Reading(read, sum(text.tokens for text in read), available)


def spread(lengths: Sequence[int], limit: int) -> list[int]:
    """Indices, evenly spread, of lengths that come to at most `limit` together; all where they do.

    Every length adds its share of the limit to what may be taken, and is taken once it fits.
    """
    total, credit = sum(lengths), 0
    if total <= limit:
        return list(range(len(lengths)))
    taken = []
    for index, length in enumerate(lengths):
        credit += limit * length
        if credit >= total * length:
            credit -= total * length
            taken.append(index)
    return taken


def spread_whole(lengths: Sequence[int], limit: int) -> list[int]:
    """As `spread`, but one at least, the shortest."""
    return spread(lengths, limit) or [min(range(len(lengths)), key=lengths.__getitem__)]


@dataclass(frozen=True)
class ScenarioText:
    """A scenario in a model's tokens: what is calibrated on, and what is held out."""

    calibration: Reading
    held_out: Reading

    def to_dict(self) -> dict[str, Any]:
        """For plan.json and `--json`."""
        return {"calibration": self.calibration.to_dict(), "held_out": self.held_out.to_dict()}


def scenario_text(session: Session, scenario: Scenario, limit: int) -> ScenarioText:
    """Both parts of a scenario, each up to `limit` tokens; made once in a session."""
    key = ("scenario text", scenario, limit)
    if key not in session.remembered:
        parts = scenario.split()
        session.remembered[key] = ScenarioText(
            *(read_texts(session.tokenizer, part, limit) for part in parts)
        )
    text: ScenarioText = session.remembered[key]
    return text


@dataclass(frozen=True)
class PoolsReading:
    """Pools as far as they are read, and how many tokens of the `available` ones that are."""

    pools: Pools
    tokens: int
    available: int


def read_pools_within(tokenizer: Any, pools: Pools, limit: int) -> PoolsReading:
    """Prompts of each part of each pool: all, or whole ones spread evenly over a part that has more
    than `limit` tokens, one at least."""
    tokens = available = 0

    def within(prompts: Sequence[str]) -> tuple[str, ...]:
        nonlocal tokens, available
        lengths = [text.tokens for text in token_texts(tokenizer, prompts)]
        kept = spread_whole(lengths, limit)
        tokens += sum(lengths[place] for place in kept)
        available += sum(lengths)
        return tuple(prompts[place] for place in kept)

    train, val = (tuple(map(within, part)) for part in (pools.train, pools.val))
    return PoolsReading(replace(pools, train=train, val=val), tokens, available)

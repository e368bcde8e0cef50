"""From conversations to token ids: the one place where text meets a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from spp_export.common.arrays import FloatArray
from spp_export.common.errors import ScenarioError
from spp_export.common.options import WINDOW
from spp_export.data.conversation import Conversation, Message
from spp_export.data.pools import Pools
from spp_export.data.scenario import Scenario
from spp_export.models.stop_tokens import turn_end

if TYPE_CHECKING:
    from spp_export.models.session import Session


# Texts that are given to a tokenizer together: its records of each take far more than the ids.
_TOGETHER = 1000
_DATE = "01 Jan 2026"


@dataclass(frozen=True)
class TokenText:
    """What is read of a text, as token ids: runs, each from a beginning of its own.

    answers: a byte for each token of each run, 1 where it is the model's to say; None where nobody
    tells who speaks, so that all tokens count.
    gradients: of a text of one run, `gradient_lengths` of its tokens [T,L,2], where they are known.
    """

    runs: tuple[tuple[int, ...], ...]
    answers: tuple[bytes, ...] | None = None
    gradients: FloatArray | None = field(default=None, compare=False, repr=False)

    @property
    def tokens(self) -> int:
        """How many there are."""
        return sum(map(len, self.runs))

    def pieces(self, window: int) -> Iterator[TokenText]:
        """Texts of one run each: the runs, those of more than `window` tokens cut after every
        `window` of them."""
        for place, run in enumerate(self.runs):
            for start in range(0, len(run), window):
                yield self._cut(place, start, start + window)

    def beginning(self, count: int) -> TokenText:
        """The first tokens, at most `count`, of the first run that has any."""
        first = (self._cut(place, 0, count) for place, run in enumerate(self.runs) if run)
        return next(first, TokenText(()))

    def _cut(self, place: int, start: int, stop: int) -> TokenText:
        answers = self.answers and (self.answers[place][start:stop],)
        gradients = None if self.gradients is None else self.gradients[start:stop]
        return TokenText((self.runs[place][start:stop],), answers, gradients)


def dialogue_text(
    ids: Sequence[int], answer: int, gradients: FloatArray | None = None
) -> TokenText:
    """A prompt and its answer, which the last tokens are."""
    return TokenText((tuple(ids),), (bytes(len(ids) - answer) + b"\1" * answer,), gradients)


def joined(pieces: Sequence[TokenText]) -> TokenText:
    """One text of the runs of several, which either all tell who speaks or none."""
    runs = tuple(run for piece in pieces for run in piece.runs)
    if any(piece.answers is None for piece in pieces):
        return TokenText(runs)
    return TokenText(runs, tuple(of_run for piece in pieces for of_run in piece.answers or ()))


# A string is read as it stands.
Text = str | Conversation | TokenText


def token_texts(tokenizer: Any, texts: Sequence[Text]) -> list[TokenText]:
    """The token ids of each text, with the tokenizer's special tokens or, of chats, those that its
    chat template writes.

    Raises ScenarioError for a chat that the template does not take.
    """
    written = [_written(tokenizer, text) for text in texts]
    read = _encoded(tokenizer, [one for of_text in written for one in of_text])
    return [
        text if isinstance(text, TokenText) else joined([next(read) for _ in of_text])
        for text, of_text in zip(texts, written, strict=True)
    ]


@dataclass(frozen=True)
class _Written:
    """A string that is read from its own beginning.

    templated: a chat template wrote it, special tokens included. answers: where in it the assistant
    speaks, as (start, end), where that is known.
    """

    text: str
    templated: bool = False
    answers: tuple[tuple[int, int], ...] | None = None


def _written(tokenizer: Any, text: Text) -> tuple[_Written, ...]:
    """The strings that a text is."""
    if isinstance(text, TokenText):
        return ()
    if isinstance(text, str):
        return (_Written(text),)
    return (_chat(tokenizer, text),) if text.chat else tuple(map(_Written, text.prompts))


def chat_text(tokenizer: Any, conversation: Conversation, *, asking: bool = False) -> str:
    """A conversation as the model's chat template writes it, up to where the assistant's answer
    begins where it is `asking` for one; without a template, what is said, with blank lines between.

    Many templates know users and assistants in turn, and no other role. For them the system's
    message begins the user's first one, a tool speaks as the user does, and messages in a row of
    one role are one. Raises ScenarioError where that does not do either.
    """
    return _chat(tokenizer, conversation, asking=asking).text


def question_ids(tokenizer: Any, conversations: Sequence[Conversation]) -> list[tuple[int, ...]]:
    """The token ids of each conversation up to where the assistant's next answer begins: as the
    chat template writes it, else its text, to be continued."""
    written = [_chat(tokenizer, conversation, asking=True) for conversation in conversations]
    return [text.runs[0] for text in _encoded(tokenizer, written)]


def _chat(tokenizer: Any, conversation: Conversation, *, asking: bool = False) -> _Written:
    if not getattr(tokenizer, "chat_template", None):
        text = "\n\n".join(message.text for message in conversation.messages)
        return _Written(text, answers=_answers(text, conversation.messages))
    reason = ""
    for messages in (conversation.messages, _in_turn(conversation.messages)):
        written = [{"role": message.role, "content": message.text} for message in messages]
        try:
            # The date is in some templates: the same text every day.
            text = tokenizer.apply_chat_template(
                written, tokenize=False, add_generation_prompt=asking, date_string=_DATE
            )
        except Exception as error:  # whatever the author of a template thought of
            reason = (str(error).splitlines() or [type(error).__name__])[0]
        else:
            return _Written(text, True, _answers(text, messages))
    first = " ".join(conversation.messages[0].text.split())
    raise ScenarioError(
        f"the conversation that begins {first[:60]!r} does not fit the model's chat template "
        f"({reason:.120}). Leave it out."
    )


def _answers(written: str, messages: Sequence[Message]) -> tuple[tuple[int, int], ...] | None:
    """Where in what was written of messages the assistant speaks; None where it does not, or where
    the template did not write what was said."""
    spans, end = [], 0
    for message in messages:
        said = message.text.strip()
        start = written.find(said, end)
        if start < 0:
            return None
        end = start + len(said)
        if message.role == "assistant" and said:
            spans.append((start, end))
    return tuple(spans) or None


def _in_turn(messages: Sequence[Message]) -> list[Message]:
    alternating: list[Message] = []
    for message in messages:
        role = "assistant" if message.role == "assistant" else "user"
        if alternating and alternating[-1].role == role:
            alternating[-1] = Message(role, f"{alternating[-1].text}\n\n{message.text}")
        else:
            alternating.append(Message(role, message.text))
    return alternating


def _encoded(tokenizer: Any, strings: Sequence[_Written]) -> Iterator[TokenText]:
    """Texts of one run each."""
    tells_places = getattr(tokenizer, "is_fast", False)
    ending = turn_end(tokenizer) if any(one.answers for one in strings) else None
    for start in range(0, len(strings), _TOGETHER):
        some = strings[start : start + _TOGETHER]
        for templated, group in groupby(some, key=lambda one: one.templated):
            together = list(group)
            options: dict[str, Any] = {"add_special_tokens": False} if templated else {}
            if tells_places and any(one.answers for one in together):
                options["return_offsets_mapping"] = True
            # Not verbose: the tokenizer warns of what is longer than the model's context.
            encoded = tokenizer([one.text for one in together], verbose=False, **options)
            places = encoded.get("offset_mapping", [None] * len(together))
            for one, ids, of_ids in zip(together, encoded["input_ids"], places, strict=True):
                answers = None
                if one.answers and of_ids is not None:
                    answers = (_marks(ids, of_ids, one.answers, ending),)
                yield TokenText((tuple(ids),), answers)


def _marks(
    ids: Sequence[int],
    places: Sequence[tuple[int, int]],
    answers: Sequence[tuple[int, int]],
    ending: int | None,
) -> bytes:
    """A byte per token: 1 for those of answers, and for the token `ending` after one.

    places: where in the string each token is, as (start, end).
    """
    marks = bytearray(len(ids))
    token = 0
    for start, end in answers:
        while token < len(ids) and places[token][0] < end:
            marks[token] = start < places[token][1]
            token += 1
        if token < len(ids) and ids[token] == ending:
            marks[token] = 1
    return bytes(marks)


@dataclass(frozen=True)
class Reading:
    """What is read of a list of texts: `tokens` of the `available` ones.

    unasked    prompts that were left out, for there are enough others
    documents  prompts that leave no room for an answer, and are read as text
    untold     conversations of which the chat template hides who said what, so that all counts
    """

    texts: tuple[TokenText, ...]
    tokens: int
    available: int
    unasked: int = 0
    documents: int = 0
    untold: int = 0

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
    taken: dict[int, list[TokenText]] = {}
    for place in spread([piece.tokens for _, piece in pieces], limit):
        index, piece = pieces[place]
        taken.setdefault(index, []).append(piece)
    read = tuple(map(joined, taken.values()))
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

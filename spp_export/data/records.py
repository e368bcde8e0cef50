"""One record of a file, such as a line of JSON or a row of a table, to the conversation it holds.

messages                       OpenAI: [{"role": "user", "content": "..."}, ...]
conversations, conversation    ShareGPT: [{"from": "human", "value": "..."}, ...]
turns                          SubspacePath Pruner's: [{"prompt": "...", "answer": "..."}, ...]
instruction, input, output     Alpaca
prompt, completion or chosen   TRL, each a string or a list of messages
prompt or text, answer         a text that is read as it stands
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from spp_export.common.errors import ScenarioError
from spp_export.common.json_files import parse_json
from spp_export.data.conversation import Conversation, Message, Turn, plain

# What files call the roles.
_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
_MOST_KEYS = 12

Record = tuple[Conversation, tuple[Turn, ...]]


def read_record(entry: Any, session: int, where: str) -> Record:
    """The conversation of a record and its turns, `session` being its number.

    A list of messages is one, too. Raises ScenarioError, in one line that starts with `where`,
    for a record that has no text where its kind has it, and names its keys where it is of no kind.
    """
    if is_messages(entry):
        entry = {"messages": entry}
    record = as_object(entry, where)
    for keys, kind in _KINDS.items():
        if all(record.get(key) is not None for key in keys):
            return kind(record, session, where)
    for key in KEYS:
        if key in record:
            raise ScenarioError(f"{where}: {key!r} is empty.")
    raise ScenarioError(f"{where}: {unknown_keys(list(record))}")


def is_messages(value: Any) -> bool:
    """Whether a value is a list of messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and ("role" in item or "from" in item) for item in value)
    )


def unknown_keys(names: Sequence[str]) -> str:
    """That none of these is a key of any kind of record."""
    shown = ", ".join(repr(name)[:60] for name in names[:_MOST_KEYS]) or "none"
    more = f" and {len(names) - _MOST_KEYS} more" if len(names) > _MOST_KEYS else ""
    return f"expected one of the keys {', '.join(KEYS)}; it has {shown}{more}. Rename one."


def as_object(value: Any, where: str) -> dict[str, Any]:
    """A value that is to be an object. Raises ScenarioError."""
    if not isinstance(value, dict):
        raise ScenarioError(f"{where}: expected an object, got {_kind(value)}.")
    return value


def optional_string(entry: Mapping[str, Any], key: str, where: str) -> str | None:
    """A string, if the entry has it. Raises ScenarioError for anything else."""
    value = entry.get(key)
    if value is not None and not isinstance(value, str):
        raise ScenarioError(f"{where}: expected {key!r} to be a string, got {_kind(value)}.")
    if value is not None and "\0" in value:
        raise ScenarioError(f"{where}: {key!r} holds a NUL character.")
    return value


def _messages(key: str) -> Callable[[Mapping[str, Any], int, str], Record]:
    """Records with a list of messages by this key."""

    def kind(record: Mapping[str, Any], session: int, where: str) -> Record:
        return _chat(record, _message_list(record[key], key, where), session, where)

    return kind


def _turns(record: Mapping[str, Any], session: int, where: str) -> Record:
    turns = tuple(_published(_list(record["turns"], "turns", where), session, where))
    if not turns:
        raise ScenarioError(f"{where}: holds no prompt.")
    return Conversation(tuple(Message("user", turn.prompt) for turn in turns)), turns


def _published(values: Sequence[Any], session: int, where: str) -> Iterator[Turn]:
    for number, value in enumerate(values, start=1):
        here = f"{where}, turn {number}"
        turn = as_object(value, here)
        key = next((key for key in ("prompt", "query") if turn.get(key) is not None), None)
        if key is None:
            raise ScenarioError(f"{here}: expected the key 'prompt' or 'query'.")
        task = optional_string(turn, "task_type", here)
        yield Turn(session, _string(turn, key, here), _answer(turn, here), task)


def _instruction(record: Mapping[str, Any], session: int, where: str) -> Record:
    parts = [_string(record, "instruction", where), optional_string(record, "input", where) or ""]
    messages = [Message("user", "\n\n".join(part for part in parts if part.strip()))]
    output = optional_string(record, "output", where) or ""
    return _chat(record, [*messages, Message("assistant", output)], session, where)


def _completed(*keys: str) -> Callable[[Mapping[str, Any], int, str], Record]:
    """Records with a prompt and what follows it, or with what follows alone, each by its key."""

    def kind(record: Mapping[str, Any], session: int, where: str) -> Record:
        messages: list[Message] = []
        for key in keys:
            if isinstance(record[key], str):
                role = "user" if key == "prompt" else "assistant"
                messages.append(Message(role, _string(record, key, where)))
            else:
                messages += _message_list(record[key], key, where)
        return _chat(record, messages, session, where)

    return kind


def _text(key: str) -> Callable[[Mapping[str, Any], int, str], Record]:
    """Records with a text by this key that is read as it stands."""

    def kind(record: Mapping[str, Any], session: int, where: str) -> Record:
        if is_messages(record[key]):
            return _chat(record, _message_list(record[key], key, where), session, where)
        text = _string(record, key, where)
        return plain(text), (Turn(session, text, _answer(record, where)),)

    return kind


_KINDS: dict[tuple[str, ...], Callable[[Mapping[str, Any], int, str], Record]] = {
    ("messages",): _messages("messages"),
    ("conversations",): _messages("conversations"),
    ("conversation",): _messages("conversation"),
    ("turns",): _turns,
    ("instruction",): _instruction,
    ("prompt", "completion"): _completed("prompt", "completion"),
    ("prompt", "chosen"): _completed("prompt", "chosen"),
    ("prompt",): _text("prompt"),
    ("chosen",): _completed("chosen"),
    ("text",): _text("text"),
}
KEYS = (*dict.fromkeys(key for keys in _KINDS for key in keys if key != "completion"),)
# All that is read of a record, for tables, whose other columns are left alone.
COLUMNS = (*KEYS, "input", "output", "completion", "answer", "system")


def _chat(
    record: Mapping[str, Any], messages: Sequence[Message], session: int, where: str
) -> Record:
    """What is said, after what the record says that the model is told to be."""
    system = optional_string(record, "system", where)
    told = [Message("system", system)] if system else []
    filled = [message for message in (*told, *messages) if message.text.strip()]
    if all(message.role == "system" for message in filled):
        raise ScenarioError(f"{where}: holds no text that anybody says.")
    following = [*filled[1:], Message("", "")]
    turns = tuple(
        Turn(session, message.text, after.text if after.role == "assistant" else None)
        for message, after in zip(filled, following, strict=True)
        if message.role == "user"
    )
    return Conversation(tuple(filled), chat=True), turns


def _message_list(value: Any, key: str, where: str) -> list[Message]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        # A cell of a table.
        value = parse_json(value, what=f"{where}: {key!r}", error=ScenarioError)
    return [
        _message(item, f"{where}, message {number}")
        for number, item in enumerate(_list(value, key, where), start=1)
    ]


def _message(value: Any, where: str) -> Message:
    message = as_object(value, where)
    names = ("role", "content") if "role" in message else ("from", "value")
    role = optional_string(message, names[0], where)
    if role is None:
        raise ScenarioError(
            f"{where}: expected the keys 'role' and 'content', or 'from' and 'value'; it has "
            f"{', '.join(map(repr, message)):.200}."
        )
    known = _ROLES.get(role.strip().lower())
    if known is None:
        raise ScenarioError(
            f"{where}: {role!r:.40} is no role that is known; they are {', '.join(_ROLES)}."
        )
    parts = (_content(message, names[1], where), *_calls(message))
    return Message(known, "\n".join(part for part in parts if part))


def _content(message: Mapping[str, Any], key: str, where: str) -> str:
    """The text of a message; of a list of parts those that are text."""
    value = message.get(key)
    if not isinstance(value, list):
        return optional_string(message, key, where) or ""
    parts = [part if isinstance(part, dict) else {"text": part} for part in value]
    texts = (optional_string(part, "text", f"{where}: {key!r}") for part in parts)
    return "\n".join(text for text in texts if text)


def _calls(message: Mapping[str, Any]) -> Iterator[str]:
    """Calls of tools as JSON, a line each."""
    calls = message.get("tool_calls")
    for call in [*(calls if isinstance(calls, list) else []), message.get("function_call")]:
        if isinstance(call, dict):
            yield json.dumps(call.get("function", call), ensure_ascii=False, default=str)


def _answer(entry: Mapping[str, Any], where: str) -> str | None:
    """The answer; of a list of accepted answers the first, as in the published evaluation."""
    answer = entry.get("answer")
    if isinstance(answer, list):
        entry = {"answer": answer[0] if answer else None}
    return optional_string(entry, "answer", where)


def _string(entry: Mapping[str, Any], key: str, where: str) -> str:
    text = optional_string(entry, key, where)
    if not text or not text.strip():
        raise ScenarioError(f"{where}: {key!r} is empty.")
    return text


def _list(value: Any, key: str, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ScenarioError(f"{where}: expected a list {key!r}, got {_kind(value)}.")
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "a boolean"
    kinds = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return kinds.get(type(value), type(value).__name__)

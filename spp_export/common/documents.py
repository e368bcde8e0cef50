"""JSON documents as strict pydantic models, refused in one line that names place and value."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from spp_export.common.errors import SppError
from spp_export.common.json_files import shown

# What a place should hold, by the type of pydantic's error, in the words of JSON.
_EXPECTED = {
    "model_type": "a JSON object",
    "dict_type": "a JSON object",
    "list_type": "a list",
    "tuple_type": "a list",
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
}
_LONGEST_KEY = 40


class Document(BaseModel):
    """A JSON object in a file that may come from anyone: exact types, and no unknown keys.

    version: what `schema_version` must be, and what to do about another one. A schema for other
    tools is `model_json_schema()`.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    version: ClassVar[tuple[int, str] | None] = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, value: Any) -> Any:
        """The first unknown key: pydantic would make a record of each of a million."""
        if isinstance(value, dict) and cls.model_config["extra"] == "forbid":
            known = [field.alias or name for name, field in cls.model_fields.items()]
            for key in value:
                if key not in known:
                    raise ValueError(
                        f"has the unknown key {shown(key)}; known are {', '.join(known)}"
                    )
        return value


DocumentT = TypeVar("DocumentT", bound=Document)
ItemT = TypeVar("ItemT")

# A JSON list as a tuple; its first bad item ends the reading.
Rows = Annotated[tuple[ItemT, ...], Field(strict=False, fail_fast=True)]


def printable(text: str) -> str:
    """For texts that must be one line without control characters."""
    if not text.isprintable():
        raise ValueError(f"is {shown(text)}, expected one line of printable text")
    return text


def validated(kind: type[DocumentT], value: Any, *, what: str, error: type[SppError]) -> DocumentT:
    """A parsed JSON value as a document of `kind`.

    Raises `error`, in one line that starts with `what`: the place in the document, what was
    expected there and what is there.
    """
    if kind.version is not None and isinstance(value, dict):
        (expected, remedy), version = kind.version, value.get("schema_version")
        if type(version) is not int or version != expected:
            raise error(
                f"{what}: schema_version is {shown(version)}, expected {expected}. {remedy}"
            )
    try:
        return kind.model_validate(value)
    except ValidationError as problem:
        raise error(f"{what}: {explained(problem)}.") from None


def explained(problem: ValidationError) -> str:
    """The first defect that pydantic met, as a sentence without its end."""
    first = problem.errors(include_url=False)[0]
    *parents, last = first["loc"] or ("",)
    place, kind, message = _dotted(first["loc"]), first["type"], first["msg"]
    if kind == "missing":
        return f"{_dotted(tuple(parents))} has no {last}"
    if kind == "unexpected_keyword_argument":
        return f"{_dotted(tuple(parents))} has the unknown key {shown(last)}"
    if kind == "value_error":  # of our own validators, which say what is wrong with the place
        return f"{place} {first['ctx']['error']}"
    expected = message.removeprefix("Input should be ").partition(" should have ")[2] or message
    expected = expected.removeprefix("Input should be ").partition(" after validation")[0]
    if kind.startswith(("greater_", "less_")):
        expected = f"a number {expected}"
    if kind == "string_pattern_mismatch":
        expected = f"text like {first['ctx']['pattern']}"
    return f"{place} is {shown(first['input'])}, expected {_EXPECTED.get(kind, expected)}"


def _dotted(place: tuple[int | str, ...]) -> str:
    """A place in a document, such as `layers[1].kv_heads`."""
    text = ""
    for step in place:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            plain = step.isidentifier() and len(step) <= _LONGEST_KEY
            text += ("." if text else "") + (step if plain else shown(step))
    return text or "the document"

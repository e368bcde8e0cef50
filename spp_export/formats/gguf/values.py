"""Metadata of a GGUF file: typed values under dotted names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

Scalar = Literal["u32", "i32", "f32", "bool", "str"]
Plain: TypeAlias = int | float | bool | str

# The numbers that the format has for types of values, as far as spp writes them.
SCALARS: Mapping[int, Scalar] = {4: "u32", 5: "i32", 6: "f32", 7: "bool", 8: "str"}
ARRAY = 9


@dataclass(frozen=True)
class Value:
    """A value, or with `items` an array of values, of one type."""

    kind: Scalar
    items: Plain | tuple[Plain, ...]

    @property
    def is_array(self) -> bool:
        """Whether this is an array."""
        return isinstance(self.items, tuple)


Metadata = dict[str, Value]


def count(number: int) -> Value:
    """A size or an id."""
    return Value("u32", number)


def real(number: float) -> Value:
    """A number as the file can hold it, in single precision."""
    return Value("f32", float(np.float32(number)))


def text(words: str) -> Value:
    """A string."""
    return Value("str", words)


def flag(yes: bool) -> Value:
    """True or false."""
    return Value("bool", yes)


def texts(words: list[str]) -> Value:
    """An array of strings."""
    return Value("str", tuple(words))


def integers(numbers: list[int]) -> Value:
    """An array of integers."""
    return Value("i32", tuple(numbers))


def reals(numbers: list[float]) -> Value:
    """An array of numbers in single precision."""
    return Value("f32", tuple(float(np.float32(number)) for number in numbers))

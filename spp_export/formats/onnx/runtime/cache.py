"""Keys and values of a decoding, kept where the graph runs: in memory or on the card."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from spp_export.common.errors import CheckpointError
from spp_export.formats.onnx.options import require

# ONNX's number of an element type, and a NumPy type of its size.
ELEMENTS: dict[str, tuple[int, type[np.generic]]] = {
    "tensor(float)": (1, np.float32),
    "tensor(float16)": (10, np.float16),
    "tensor(bfloat16)": (16, np.float16),
}
_BFLOAT16 = "tensor(bfloat16)"


@dataclass(frozen=True)
class Entry:
    """A key or value tensor [B,heads,tokens,head_dim] of a graph: where it goes in and out."""

    past: str
    present: str
    heads: int
    head_dim: int
    type: str


class Cache(Protocol):
    """Keeps past and present of every entry bound. The binding's first output is the logits."""

    def before_run(self) -> None:
        """Bind what the last run has used up."""

    def after_run(self) -> None:
        """Take over what a run has put out."""


def entries(session: Any) -> list[Entry]:
    """The keys and values that a graph takes, in its order."""
    listed = []
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            heads, head_dim = _sizes(value)
            present = value.name.replace("past_key_values", "present", 1)
            listed.append(Entry(value.name, present, heads, head_dim, value.type))
    return listed


def _sizes(value: Any) -> tuple[int, int]:
    """Heads, and elements of each, of an input [B,heads,tokens,head_dim]."""
    match value.shape:
        case [_, int(heads), _, int(head_dim)] if heads > 0 and head_dim > 0:
            return heads, head_dim
    raise CheckpointError(
        f"the graph's input {value.name!r:.60} has shape {value.shape!r:.80}, expected numbers of "
        "heads and of their elements. Export it again."
    )


class SharedCache:
    """One buffer [B,heads,capacity,head_dim] per entry is its past and its present at once."""

    def __init__(
        self, session: Any, binding: Any, card: int | None, batch: int, capacity: int
    ) -> None:
        make = require("onnxruntime").OrtValue.ortvalue_from_numpy
        place = _place(card)
        self._buffers = []
        for entry in entries(session):
            shape = [batch, entry.heads, capacity, entry.head_dim]
            element, alike = ELEMENTS[entry.type]
            # Zeros: an unused row that held NaN would spoil a sum that weighs it with nothing.
            buffer = make(np.zeros(shape, alike), *place)
            self._buffers.append(buffer)  # binding by address does not keep it
            where = (*place, element, shape, buffer.data_ptr())
            binding.bind_input(entry.past, *where)
            binding.bind_output(entry.present, *where)

    def before_run(self) -> None:
        """Nothing: the buffers stay bound."""

    def after_run(self) -> None:
        """Nothing: the buffers have grown in place."""


class GrowingCache:
    """A run's present, one token longer than its past or more, is the next run's past."""

    def __init__(self, session: Any, binding: Any, card: int | None, batch: int) -> None:
        make = require("onnxruntime").OrtValue.ortvalue_from_shape_and_type
        self._binding, self._place = binding, _place(card)
        self._entries = entries(session)
        for entry in self._entries:
            shape = [batch, entry.heads, 0, entry.head_dim]
            empty = make(shape, ELEMENTS[entry.type][0], *self._place)
            binding.bind_ortvalue_input(entry.past, empty)

    def before_run(self) -> None:
        """Let ONNX Runtime allocate the longer tensors."""
        for entry in self._entries:
            self._binding.bind_output(entry.present, *self._place)

    def after_run(self) -> None:
        """What came out goes in."""
        outputs = self._binding.get_outputs()
        for entry, value in zip(self._entries, outputs[1:], strict=True):
            self._binding.bind_ortvalue_input(entry.past, value)


def to_float32(stored: NDArray[Any], kind: str) -> NDArray[np.float32]:
    """What a graph wrote as elements of type `kind`, see `ELEMENTS`, as float32."""
    if kind != _BFLOAT16:
        return stored.astype(np.float32, copy=False)
    # NumPy has no such type: its 16 bits are the upper half of a float32.
    return (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _place(card: int | None) -> tuple[str, int]:
    return ("cpu", 0) if card is None else ("cuda", card)

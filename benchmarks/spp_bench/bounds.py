"""What a model must move and compute in a cell, and how much faster than another model it can be.

A decode step reads every weight it multiplies by once and every cached key and value once; prefill
does two operations per weight and token, plus those of attention. Whichever takes longer at the
device's measured rates sets the pace, and the bound on a speed-up is the ratio of those times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from spp_bench.cases import Cell
from spp_export.models.shape import LayerShape, ModelShape

# Below this, no measurement can tell a gain from noise.
NO_GAIN = 1.02
# How far the placement of weights in memory and the clock's drift may shift a ratio between two
# models in one process, on top of what the rounds show.
SYSTEMATIC = 0.03

Term = Literal["bytes", "operations"]


@dataclass(frozen=True)
class Rates:
    """What the device reached in this process: bytes and operations per second."""

    bytes_per_second: float
    operations_per_second: float

    def seconds(self, work: Work) -> float:
        """The least time for some work: its larger term."""
        return max(self.terms(work).values())

    def to_dict(self) -> dict[str, int]:
        """For the results file."""
        return {name: round(value) for name, value in asdict(self).items()}

    def terms(self, work: Work) -> dict[Term, float]:
        """Seconds of each term by itself."""
        return {
            "bytes": work.bytes / self.bytes_per_second,
            "operations": work.operations / self.operations_per_second,
        }


@dataclass(frozen=True)
class Work:
    """Bytes moved and operations done, of which a multiplication and an addition are two."""

    bytes: float
    operations: float


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model in the format it is run in.

    shape             the dense model's, with the biases that are there
    layers            what every layer has
    windows           per layer, how many last tokens attention sees; None is all of them
    read_bytes        weights that a decode step reads
    kv_element_bytes  bytes of one element of the cache
    every_logit       whether prefill computes the logits of every token or of the last
    """

    shape: ModelShape
    layers: Sequence[LayerShape]
    windows: Sequence[int | None]
    read_bytes: int
    kv_element_bytes: int
    every_logit: bool

    def kv_bytes(self, cell: Cell, cached: float) -> float:
        """Bytes of keys and values seen where every sequence has `cached` tokens."""
        per_head = 2 * self.shape.head_dim * self.kv_element_bytes
        seen = sum(
            layer.kv_heads * _seen(cached, window)
            for layer, window in zip(self.layers, self.windows, strict=True)
        )
        return cell.batch * per_head * seen

    def decode(self, cell: Cell, new_tokens: int) -> Work:
        """The work of an average one of `new_tokens` steps after the cell's context."""
        cached = cell.context + (new_tokens + 1) / 2
        per_token = 2 * (self._layer_parameters + self._head_parameters)
        attention = 4 * self.shape.head_dim * self._pairs(_seen, cached)
        return Work(
            self.read_bytes + self.kv_bytes(cell, cached), cell.batch * (per_token + attention)
        )

    def prefill(self, cell: Cell) -> Work:
        """The work of one pass over all of the cell's prompts."""
        logits = cell.context if self.every_logit else 1
        attention = 4 * self.shape.head_dim * self._pairs(_seen_by_prompt, cell.context)
        operations = cell.context * (2 * self._layer_parameters + attention)
        operations += 2 * logits * self._head_parameters
        return Work(self.read_bytes + self.kv_bytes(cell, cell.context), cell.batch * operations)

    @property
    def _layer_parameters(self) -> int:
        channels = sum(layer.channels for layer in self.layers)
        return self.shape.head_parameters(self.layers) + channels * self.shape.channel_parameters

    @property
    def _head_parameters(self) -> int:
        return self.shape.vocab_size * self.shape.hidden_size

    def _pairs(self, seen: Callable[[float, int | None], float], tokens: float) -> float:
        """Pairs of a query head and a token that a query sees, over the layers."""
        return sum(
            layer.query_heads * seen(tokens, window)
            for layer, window in zip(self.layers, self.windows, strict=True)
        )


def _seen(cached: float, window: int | None) -> float:
    return cached if window is None else min(cached, window)


def _seen_by_prompt(tokens: float, window: int | None) -> float:
    """How many tokens a prompt's token sees on average: all earlier ones at first, then at most
    the window."""
    filling = _seen(tokens, window)
    return filling - filling * (filling - 1) / (2 * tokens)


@dataclass(frozen=True)
class Bound:
    """How much faster a slim model can be.

    value    by the larger term of either model at the measured rates
    ceiling  the larger of the ratios of bytes and of operations: where both terms cost time, no
             mixture of them gives more than this
    term     which of them sets the dense model's pace
    """

    value: float
    ceiling: float
    term: Term

    def efficiency(self, speedup: float) -> float | None:
        """The share of the possible gain that was reached; None where no gain is possible."""
        return (speedup - 1) / (self.value - 1) if self.value > NO_GAIN else None

    def exceeded(self, low: float) -> bool:
        """Whether a speed-up of at least `low` is impossible."""
        return low > self.ceiling * (1 + SYSTEMATIC)


def bound(dense: Work, slim: Work, rates: Rates) -> Bound:
    """The bound on the slim model's speed-up over the dense one."""
    terms = rates.terms(dense)
    return Bound(
        value=rates.seconds(dense) / rates.seconds(slim),
        ceiling=max(dense.bytes / slim.bytes, dense.operations / slim.operations),
        term="bytes" if terms["bytes"] >= terms["operations"] else "operations",
    )

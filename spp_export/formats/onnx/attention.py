"""The three forms of an attention block, from the packed projection to what o_proj reads.

A form is made once per graph, with what all layers share: masks, lengths, rotary tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from spp_export.formats.onnx.options import Attention
from spp_export.formats.onnx.recorder import BATCH, MICROSOFT, SEQUENCE, TOTAL, Recorder
from spp_export.models.shape import LayerShape

if TYPE_CHECKING:
    import onnx_ir as ir

# The name is the message: it is what a user reads who pads on the left all the same.
LEFT_PADDING_GUARD = "left_padding_needs_gqa_bias"


@dataclass(frozen=True)
class AttentionInputs:
    """What one layer's attention reads.

    packed          [B, S, (H + 2G) D], queries, keys and values side by side
    past            key and value so far, each [B, G, past, D]
    norms           weights [D] of the q and k norms, where the family has them
    """

    packed: ir.Value
    past: tuple[ir.Value, ir.Value]
    norms: tuple[ir.Value, ir.Value] | None
    layer: LayerShape
    head_dim: int
    window: int | None
    epsilon: float
    name: str


# Attention's output [B, S, H D], and key and value with the new tokens.
Attended = tuple[Any, Any, Any]


class Form(Protocol):
    """One way to write attention."""

    def __call__(self, inputs: AttentionInputs) -> Attended: ...


@dataclass(frozen=True)
class Shared:
    """Graph inputs and tables that every layer uses."""

    input_ids: ir.Value
    attention_mask: ir.Value
    position_ids: ir.Value | None
    cos: ir.Value
    sin: ir.Value


def attention_form(form: Attention, g: Recorder, shared: Shared) -> Form:
    """The form by its name."""
    make: Mapping[Attention, Callable[[Recorder, Shared], Form]] = {
        "gqa": _Grouped,
        "gqa-bias": _GroupedWithBias,
        "standard": _Standard,
    }
    return make[form](g, shared)


class _Grouped:
    """GroupQueryAttention with its rotary inside; each row's length is the sum of its mask."""

    def __init__(self, g: Recorder, shared: Shared) -> None:
        self._g, self._shared = g, shared
        real = g.op(
            "ReduceSum",
            [shared.attention_mask, g.constant([1], "axis_1")],
            "mask/real_tokens",
            [BATCH],
            dtype="INT64",
            keepdims=0,
        )
        last = g.op("Sub", [real, g.constant(1, "one")], "mask/last_token", [BATCH], dtype="INT64")
        guarded = g.op("Add", [last, self._guard()], "mask/checked", [BATCH], dtype="INT64")
        self._last = g.op("Cast", [guarded], "seqlens_k", [BATCH], dtype="INT32", to=_INT32)
        self._total = _total_length(g, shared)

    def _guard(self) -> Any:
        """Zero [B], or an index out of bounds for a row whose first token is padding, for which
        GroupQueryAttention would silently give wrong logits.
        """
        g = self._g
        first = g.op(
            "Gather",
            [self._shared.attention_mask, g.constant(0, "zero")],
            "mask/first",
            [BATCH],
            dtype="INT64",
            axis=1,
        )
        padded = g.op(
            "Sub", [g.constant(1, "one"), first], "mask/first_is_padding", [BATCH], dtype="INT64"
        )
        return g.op(
            "Gather",
            [g.constant([0], "only_zero"), padded],
            LEFT_PADDING_GUARD,
            [BATCH],
            dtype="INT64",
        )

    def __call__(self, inputs: AttentionInputs) -> Attended:
        g, shared = self._g, self._shared
        queries: list[Any] = [inputs.packed, None, None]
        if inputs.norms:
            queries = list(_normed(g, inputs))
        return _group_query_attention(
            g,
            inputs,
            [*queries, *inputs.past, self._last, self._total, shared.cos, shared.sin],
            do_rotary=1,
            **({} if inputs.window is None else {"local_window_size": inputs.window}),
        )


class _GroupedWithBias:
    """GroupQueryAttention whose rotary and mask are made outside, from position_ids and the mask.

    With rotary inside it would take a row's first position for all of its prompt.
    """

    def __init__(self, g: Recorder, shared: Shared) -> None:
        self._g, self._shared, self._masks = g, shared, _Masks(g, shared)
        self._total = _total_length(g, shared)
        batch = g.op("Shape", [shared.input_ids], "mask/batch", [1], dtype="INT64", start=0, end=1)
        last = g.op(
            "Sub",
            [self._total, g.constant(np.asarray(1, np.int32), "one_int32")],
            "mask/last_token",
            [],
            dtype="INT32",
        )
        self._last = g.op("Expand", [last, batch], "seqlens_k", [BATCH], dtype="INT32")

    def __call__(self, inputs: AttentionInputs) -> Attended:
        g, shared = self._g, self._shared
        query, key, value = _normed(g, inputs) if inputs.norms else _split(g, inputs)
        rotated = [
            g.op(
                "RotaryEmbedding",
                [part, shared.position_ids, shared.cos, shared.sin],
                f"{inputs.name}/rotated_{name}",
                [BATCH, SEQUENCE, heads * inputs.head_dim],
                domain=MICROSOFT,
            )
            for part, name, heads in (
                (query, "query", inputs.layer.query_heads),
                (key, "key", inputs.layer.kv_heads),
            )
        ]
        return _group_query_attention(
            g,
            inputs,
            [
                *(*rotated, value, *inputs.past, self._last, self._total),
                *(None, None, None, self._masks.bias(inputs.window)),
            ],
            do_rotary=0,
        )


class _Standard:
    """RotaryEmbedding and Attention of the ONNX standard (opset 24)."""

    def __init__(self, g: Recorder, shared: Shared) -> None:
        self._g, self._shared, self._masks = g, shared, _Masks(g, shared)

    def __call__(self, inputs: AttentionInputs) -> Attended:
        g, shared, layer, dim = self._g, self._shared, inputs.layer, inputs.head_dim
        query, key, value = _normed(g, inputs) if inputs.norms else _split(g, inputs)
        rotated = [
            g.op(
                "RotaryEmbedding",
                [part, shared.cos, shared.sin, shared.position_ids],
                f"{inputs.name}/rotated_{name}",
                [BATCH, SEQUENCE, heads * dim],
                num_heads=heads,
            )
            for part, name, heads in (
                (query, "query", layer.query_heads),
                (key, "key", layer.kv_heads),
            )
        ]
        attended, new_key, new_value = g.ops(
            "Attention",
            [*rotated, value, self._masks.allowed(inputs.window), *inputs.past],
            inputs.name,
            _attended_shapes(inputs),
            q_num_heads=layer.query_heads,
            kv_num_heads=layer.kv_heads,
        )
        return attended, new_key, new_value


class _Masks:
    """Which keys a query sees: real ones, not after it, inside the window; and itself always, so
    that no row of padding is empty, which would give NaN."""

    def __init__(self, g: Recorder, shared: Shared) -> None:
        self._g = g
        total = g.op(
            "Shape", [shared.attention_mask], "mask/total", [1], dtype="INT64", start=1, end=2
        )
        length = g.op(
            "Shape", [shared.input_ids], "mask/length", [1], dtype="INT64", start=1, end=2
        )
        scalars = [
            g.op("Squeeze", [value], f"mask/{name}_scalar", [], dtype="INT64")
            for value, name in ((total, "total"), (length, "length"))
        ]
        past = g.op("Sub", scalars, "mask/past", [], dtype="INT64")
        zero, unit = g.constant(0, "zero"), g.constant(1, "one")
        self._mask = shared.attention_mask
        queries = g.op("Range", [past, scalars[0], unit], "mask/queries", [SEQUENCE], dtype="INT64")
        self._columns = queries
        self._query = g.op(
            "Unsqueeze",
            [queries, g.constant([1], "axis_1")],
            "mask/query_column",
            [SEQUENCE, 1],
            dtype="INT64",
        )
        self._key = g.op("Range", [zero, scalars[0], unit], "mask/keys", [TOTAL], dtype="INT64")
        real = g.op(
            "Cast", [shared.attention_mask], "mask/real", [BATCH, TOTAL], dtype="BOOL", to=_BOOL
        )
        self._real = g.op(
            "Unsqueeze",
            [real, g.constant([1, 2], "axes_1_2")],
            "mask/real_row",
            [BATCH, 1, 1, TOTAL],
            dtype="BOOL",
        )
        self._allowed: dict[int | None, Any] = {}
        self._bias: dict[int | None, Any] = {}

    def allowed(self, window: int | None) -> Any:
        """Booleans [B, 1, S, T]."""
        if window not in self._allowed:
            self._allowed[window] = self._make(window)
        return self._allowed[window]

    def bias(self, window: int | None) -> Any:
        """0 where a key is seen, the lowest number elsewhere: [B, 1, S, T]."""
        if window not in self._bias:
            g = self._g
            lowest = _lowest(g)
            low = g.constant(lowest, "lowest")
            zero = g.constant(np.zeros_like(lowest), "no_bias")
            self._bias[window] = g.op(
                "Where",
                [self.allowed(window), zero, low],
                f"mask/bias{_suffix(window)}",
                [BATCH, 1, SEQUENCE, TOTAL],
            )
        return self._bias[window]

    def _make(self, window: int | None) -> Any:
        g, suffix = self._g, _suffix(window)

        def compare(kind: str, left: Any, right: Any, name: str) -> Any:
            return g.op(kind, [left, right], f"mask/{name}", [SEQUENCE, TOTAL], dtype="BOOL")

        seen = compare("LessOrEqual", self._key, self._query, f"causal{suffix}")
        itself = compare("Equal", self._key, self._query, f"itself{suffix}")
        shape: list[int | str] = [BATCH, 1, SEQUENCE, TOTAL]
        if window is not None:
            seen = g.op(
                "And",
                [seen, self._inside(window)],
                f"mask/seen{suffix}",
                [BATCH, 1, SEQUENCE, TOTAL],
                dtype="BOOL",
            )
        real = g.op("And", [seen, self._real], f"mask/seen_real{suffix}", shape, dtype="BOOL")
        return g.op("Or", [real, itself], f"mask/allowed{suffix}", shape, dtype="BOOL")

    def _inside(self, window: int) -> Any:
        """Whether a key is among the last `window` real tokens: [B, 1, S, T].

        Positions count real tokens: padding may stand between a prompt and what follows it.
        """
        g, unit = self._g, self._g.constant(1, "one")
        counted = g.op(
            "CumSum",
            [self._mask, unit],
            "mask/real_so_far",
            [BATCH, TOTAL],
            dtype="INT64",
        )
        own = g.op(
            "Gather", [counted, self._columns], "mask/own", [BATCH, SEQUENCE], dtype="INT64", axis=1
        )
        first = g.op(
            "Sub",
            [own, g.constant(window, f"window_{window}")],
            f"mask/before_window_{window}",
            [BATCH, SEQUENCE],
            dtype="INT64",
        )
        key = g.op(
            "Unsqueeze",
            [counted, g.constant([1, 2], "axes_1_2")],
            f"mask/key_position_{window}",
            [BATCH, 1, 1, TOTAL],
            dtype="INT64",
        )
        before = g.op(
            "Unsqueeze",
            [first, g.constant([1, 3], "axes_1_3")],
            f"mask/window_start_{window}",
            [BATCH, 1, SEQUENCE, 1],
            dtype="INT64",
        )
        return g.op(
            "Greater",
            [key, before],
            f"mask/inside_{window}",
            [BATCH, 1, SEQUENCE, TOTAL],
            dtype="BOOL",
        )


def _group_query_attention(
    g: Recorder, inputs: AttentionInputs, values: list[Any], **attributes: Any
) -> Attended:
    attended, key, value = g.ops(
        "GroupQueryAttention",
        values,
        inputs.name,
        _attended_shapes(inputs),
        domain=MICROSOFT,
        num_heads=inputs.layer.query_heads,
        kv_num_heads=inputs.layer.kv_heads,
        scale=float(inputs.head_dim**-0.5),
        **attributes,
    )
    return attended, key, value


def _attended_shapes(inputs: AttentionInputs) -> list[tuple[str, list[int | str]]]:
    layer, dim = inputs.layer, inputs.head_dim
    cache: list[int | str] = [BATCH, layer.kv_heads, TOTAL, dim]
    return [
        (inputs.name, [BATCH, SEQUENCE, layer.query_heads * dim]),
        (f"{inputs.name}/key", cache),
        (f"{inputs.name}/value", cache),
    ]


def _split(g: Recorder, inputs: AttentionInputs) -> tuple[Any, Any, Any]:
    dim = inputs.head_dim
    widths = [inputs.layer.query_heads * dim, *[inputs.layer.kv_heads * dim] * 2]
    sizes = g.constant(widths, f"{inputs.name}/widths")
    query, key, value = g.ops(
        "Split",
        [inputs.packed, sizes],
        f"{inputs.name}/split",
        [
            (f"{inputs.name}/{part}", [BATCH, SEQUENCE, width])
            for part, width in zip(("q", "k", "v"), widths, strict=True)
        ],
        axis=-1,
    )
    return query, key, value


def _normed(g: Recorder, inputs: AttentionInputs) -> tuple[Any, Any, Any]:
    """Queries and keys normalised head by head, values as they are."""
    assert inputs.norms is not None
    query, key, value = _split(g, inputs)
    heads = (inputs.layer.query_heads, inputs.layer.kv_heads)
    normed = []
    for part, weight, count, name in zip((query, key), inputs.norms, heads, "qk", strict=True):
        dim = inputs.head_dim
        apart = g.op(
            "Reshape",
            [part, g.constant([0, 0, count, dim], f"heads_{count}")],
            f"{inputs.name}/{name}_heads",
            [BATCH, SEQUENCE, count, dim],
        )
        scaled = g.op(
            "RMSNormalization",
            [apart, weight],
            f"{inputs.name}/{name}_norm",
            [BATCH, SEQUENCE, count, dim],
            axis=-1,
            epsilon=inputs.epsilon,
        )
        normed.append(
            g.op(
                "Reshape",
                [scaled, g.constant([0, 0, count * dim], f"flat_{count}")],
                f"{inputs.name}/{name}_normed",
                [BATCH, SEQUENCE, count * dim],
            )
        )
    return normed[0], normed[1], value


def _total_length(g: Recorder, shared: Shared) -> Any:
    """Tokens in the longest row, int32 [] as GroupQueryAttention wants it."""
    length = g.op(
        "Shape", [shared.attention_mask], "mask/total_length", [1], dtype="INT64", start=1, end=2
    )
    scalar = g.op("Squeeze", [length], "mask/total_scalar32", [], dtype="INT64")
    return g.op("Cast", [scalar], "total_length", [], dtype="INT32", to=_INT32)


def _lowest(g: Recorder) -> Any:
    """The lowest finite number of the graph's type."""
    if g.dtype.name == "BFLOAT16":
        import ml_dtypes

        limits: Any = ml_dtypes.finfo
        return np.asarray(limits(ml_dtypes.bfloat16).min, ml_dtypes.bfloat16)
    kind = np.float32 if g.dtype.name == "FLOAT" else np.float16
    return np.asarray(np.finfo(kind).min, kind)


def _suffix(window: int | None) -> str:
    return "" if window is None else f"_{window}"


# onnx.TensorProto's numbers of the types that Cast is told.
_INT32, _BOOL = 6, 9

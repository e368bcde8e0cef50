"""The three forms of an attention block, from the packed projection to what o_proj reads.

A form is made once per graph, with what all layers share: masks, lengths, rotary tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from spp_export.formats.onnx.norms import Norms
from spp_export.formats.onnx.options import INSIDE_MULTIPLE, Attention
from spp_export.formats.onnx.recorder import BATCH, MICROSOFT, SEQUENCE, TOTAL, Recorder
from spp_export.formats.settings import Settings
from spp_export.models.shape import LayerShape

if TYPE_CHECKING:
    import onnx_ir as ir

# The name is the message: it is what a user reads who pads on the left all the same.
LEFT_PADDING_GUARD = "left_padding_needs_gqa_bias"


@dataclass(frozen=True)
class Rotary:
    """A rotary embedding of the first `size` elements of a head, by tables [positions, size/2]."""

    cos: ir.Value
    sin: ir.Value
    size: int
    interleaved: bool


@dataclass(frozen=True)
class HeadNorms:
    """Norms of queries and of keys, by modules of the checkpoint; "" has no weights. `wide`: of all
    heads at once."""

    norms: Norms
    query: str
    key: str
    wide: bool = False


@dataclass(frozen=True)
class AttentionInputs:
    """What one layer's attention does with its packed projection, which is [B, S, (H + 2G) D]:
    queries, keys and values side by side.

    past            key and value so far, each [B, G, past, D]
    slopes          of a bias by distance, for each query head; empty is none
    sinks           of each query head [H], which its softmax counts among the scores; None is none
    """

    past: tuple[ir.Value, ir.Value]
    layer: LayerShape
    head_dim: int
    settings: Settings
    window: int | None
    rotary: Rotary | None
    slopes: tuple[float, ...]
    norms: HeadNorms | None
    sinks: ir.Value | None
    name: str

    @property
    def apart(self) -> bool:
        """Whether something is done to queries, keys or values by themselves."""
        return bool(
            self.norms or self.settings.clip is not None or self.settings.computed.query_factor
        )


# Attention's output [B, S, H D], and key and value with the new tokens.
Attended = tuple[Any, Any, Any]


class Form(Protocol):
    """One way to write attention."""

    def __call__(self, packed: ir.Value, inputs: AttentionInputs) -> Attended: ...

    def positions(self) -> Any:
        """The place of every new token in its text: [B, S]."""


@dataclass(frozen=True)
class Shared:
    """Graph inputs that every layer uses."""

    input_ids: ir.Value
    attention_mask: ir.Value
    position_ids: ir.Value | None


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
        self._positions: Any = None
        self._distance: Any = None
        self._real = real = g.op(
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

    def positions(self) -> Any:
        """By the lengths of the rows: after what was read before, or from the beginning, for rows
        that are padded behind."""
        if self._positions is None:
            g = self._g
            length = g.op(
                "Shape", [self._shared.input_ids], "mask/length", [1], dtype="INT64", start=1, end=2
            )
            before = g.op("Sub", [self._real, length], "mask/before", [BATCH], dtype="INT64")
            none = g.constant(0, "zero")
            before = g.op("Max", [before, none], "mask/read_before", [BATCH], dtype="INT64")
            column = g.op(
                "Unsqueeze",
                [before, g.constant([1], "axis_1")],
                "mask/read_before_column",
                [BATCH, 1],
                dtype="INT64",
            )
            count = g.op("Squeeze", [length], "mask/length_scalar", [], dtype="INT64")
            new = g.op(
                "Range",
                [none, count, g.constant(1, "one")],
                "mask/new",
                [SEQUENCE],
                dtype="INT64",
            )
            shape: list[int | str] = [BATCH, SEQUENCE]
            self._positions = g.op("Add", [column, new], "positions", shape, dtype="INT64")
        return self._positions

    def __call__(self, packed: Any, inputs: AttentionInputs) -> Attended:
        g, rotary = self._g, inputs.rotary
        queries: list[Any] = [packed, None, None]
        # The operator's own rotary takes positions from the lengths.
        inside = rotary is not None and not rotary.size % INSIDE_MULTIPLE
        attributes: dict[str, Any] = {"do_rotary": int(inside)}
        if inputs.apart or (rotary and not inside):
            queries = list(_prepared(g, packed, inputs, self.positions))
        tables: list[Any] = [None, None]
        if rotary and inside:
            tables = [rotary.cos, rotary.sin]
            attributes |= {"rotary_interleaved": 1} if rotary.interleaved else {}
        elif rotary:
            queries[:2] = _rotated(g, queries[:2], inputs, self.positions())
        if inputs.window is not None:
            attributes["local_window_size"] = inputs.window
        values = [*queries, *inputs.past, self._last, self._total, *tables]
        if inputs.slopes:
            values += [None, self._bias(inputs)]
        return _group_query_attention(g, inputs, values, **attributes)

    def _bias(self, inputs: AttentionInputs) -> Any:
        """By distance, in columns of the cache [1, H, S, T]: rows are padded behind, if at all."""
        if self._distance is None:
            self._distance = _Columns(self._g, self._shared).distance()
        shape: list[int | str] = [1, inputs.layer.query_heads, SEQUENCE, TOTAL]
        return _by_distance(self._g, self._distance, inputs, shape)


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

    def positions(self) -> Any:
        """A graph input."""
        return self._shared.position_ids

    def __call__(self, packed: Any, inputs: AttentionInputs) -> Attended:
        g = self._g
        *pair, value = _prepared(g, packed, inputs, self.positions)
        if inputs.rotary:
            pair = _rotated(g, pair, inputs, self.positions())
        bias = self._masks.bias(inputs.window)
        if inputs.slopes:
            bias = self._masks.with_distance(bias, inputs)
        values = [*pair, value, *inputs.past, self._last, self._total, None, None, None, bias]
        return _group_query_attention(g, inputs, values, do_rotary=0)


class _Standard:
    """RotaryEmbedding and Attention of the ONNX standard (opset 24)."""

    def __init__(self, g: Recorder, shared: Shared) -> None:
        self._g, self._shared, self._masks = g, shared, _Masks(g, shared)

    def positions(self) -> Any:
        """A graph input."""
        return self._shared.position_ids

    def __call__(self, packed: Any, inputs: AttentionInputs) -> Attended:
        g, layer, dim, rotary = self._g, inputs.layer, inputs.head_dim, inputs.rotary
        *pair, value = _prepared(g, packed, inputs, self.positions)
        if rotary:
            more = _turning(rotary, dim)
            pair = [
                g.op(
                    "RotaryEmbedding",
                    [part, rotary.cos, rotary.sin, self.positions()],
                    f"{inputs.name}/rotated_{name}",
                    [BATCH, SEQUENCE, heads * dim],
                    num_heads=heads,
                    **more,
                )
                for part, name, heads in _heads(pair, inputs)
            ]
        settings = inputs.settings
        mask = self._masks.allowed(inputs.window)
        if inputs.slopes:
            mask = self._masks.with_distance(self._masks.bias(inputs.window), inputs)
        factors: dict[str, Any] = {}
        if settings.score_cap is not None:
            factors["softcap"] = settings.score_cap
        if settings.scores != dim**-0.5:
            factors["scale"] = settings.scores
        outputs = _attended_shapes(inputs)
        if inputs.sinks is not None:
            factors["qk_matmul_output_mode"] = _MASKED
            scores: list[int | str] = [BATCH, layer.query_heads, SEQUENCE, TOTAL]
            outputs = [(f"{inputs.name}/whole", outputs[0][1]), *outputs[1:]]
            outputs.append((f"{inputs.name}/scores", scores))
        attended, new_key, new_value, *rest = g.ops(
            "Attention",
            [*pair, value, mask, *inputs.past],
            inputs.name,
            outputs,
            q_num_heads=layer.query_heads,
            kv_num_heads=layer.kv_heads,
            **factors,
        )
        if inputs.sinks is not None:
            attended = self._sunk(attended, rest[0], inputs)
        return attended, new_key, new_value

    def _sunk(self, attended: Any, scores: Any, inputs: AttentionInputs) -> Any:
        """What the heads give where their sinks count among the scores [B,H,S,T]: a share of it,
        Z / (Z + exp(sink)) with Z the sum of the exponentials."""
        g, name, heads = self._g, inputs.name, inputs.layer.query_heads
        axis = g.constant([3], "axis_3")
        shape: list[int | str] = [BATCH, heads, SEQUENCE, 1]
        total = g.op("ReduceLogSumExp", [scores, axis], f"{name}/total", shape, keepdims=1)
        rows = g.constant([1, 2], "axes_1_2")
        sinks = g.op("Unsqueeze", [inputs.sinks, rows], f"{name}/sink_rows", [heads, 1, 1])
        above = g.op("Sub", [total, sinks], f"{name}/above_sinks", shape)
        share = g.op("Sigmoid", [above], f"{name}/share", shape)
        turned: list[int | str] = [BATCH, SEQUENCE, heads, 1]
        share = g.op("Transpose", [share], f"{name}/share_by_token", turned, perm=[0, 2, 1, 3])
        apart: list[int | str] = [BATCH, SEQUENCE, heads, inputs.head_dim]
        sizes = g.constant([0, 0, heads, inputs.head_dim], f"heads_{heads}")
        rest = g.op("Reshape", [attended, sizes], f"{name}/heads", apart)
        rest = g.op("Mul", [rest, share], f"{name}/shared", apart)
        flat = g.constant([0, 0, heads * inputs.head_dim], f"flat_{heads}")
        whole: list[int | str] = [BATCH, SEQUENCE, heads * inputs.head_dim]
        return g.op("Reshape", [rest, flat], name, whole)


class _Columns:
    """The columns of keys, and those of the new tokens among them."""

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
        queries = g.op("Range", [past, scalars[0], unit], "mask/queries", [SEQUENCE], dtype="INT64")
        self.queries = queries
        self.query = g.op(
            "Unsqueeze",
            [queries, g.constant([1], "axis_1")],
            "mask/query_column",
            [SEQUENCE, 1],
            dtype="INT64",
        )
        self.key = g.op("Range", [zero, scalars[0], unit], "mask/keys", [TOTAL], dtype="INT64")

    def distance(self) -> Any:
        """From a query to every key, below zero for those before it: [S, T]."""
        return _distance(self._g, self.key, self.query, [SEQUENCE, TOTAL])


class _Masks:
    """Which keys a query sees: real ones, not after it, inside the window; and itself always, so
    that no row of padding is empty, which would give NaN."""

    def __init__(self, g: Recorder, shared: Shared) -> None:
        self._g = g
        columns = _Columns(g, shared)
        self._columns, self._query, self._key = columns.queries, columns.query, columns.key
        self._mask = shared.attention_mask
        self._counted: tuple[Any, Any] | None = None
        self._distance: Any = None
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
            low = g.constant(g.lowest, "lowest")
            zero = g.constant(np.zeros_like(g.lowest), "no_bias")
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
        g = self._g
        counted, own = self._real_tokens()
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

    def _real_tokens(self) -> tuple[Any, Any]:
        """How many real tokens there are up to every key [B, T] and up to every query [B, S]."""
        if self._counted is None:
            g, unit = self._g, self._g.constant(1, "one")
            counted = g.op(
                "CumSum",
                [self._mask, unit],
                "mask/real_so_far",
                [BATCH, TOTAL],
                dtype="INT64",
            )
            own = g.op(
                "Gather",
                [counted, self._columns],
                "mask/own",
                [BATCH, SEQUENCE],
                dtype="INT64",
                axis=1,
            )
            self._counted = counted, own
        return self._counted

    def with_distance(self, bias: Any, inputs: AttentionInputs) -> Any:
        """A mask [B, 1, S, T] and the layer's bias by distance in real tokens: [B, H, S, T]."""
        g = self._g
        if self._distance is None:
            counted, own = self._real_tokens()
            shapes: list[list[int | str]] = [[BATCH, 1, 1, TOTAL], [BATCH, 1, SEQUENCE, 1]]
            key, query = (
                g.op(
                    "Unsqueeze",
                    [value, g.constant(axes, f"axes_{axes[0]}_{axes[1]}")],
                    f"mask/{name}_of_distance",
                    shape,
                    dtype="INT64",
                )
                for value, axes, name, shape in zip(
                    (counted, own), ([1, 2], [1, 3]), ("key", "query"), shapes, strict=True
                )
            )
            self._distance = _distance(g, key, query, [BATCH, 1, SEQUENCE, TOTAL])
        shape: list[int | str] = [BATCH, inputs.layer.query_heads, SEQUENCE, TOTAL]
        more = _by_distance(g, self._distance, inputs, shape)
        return g.op("Add", [bias, more], f"{inputs.name}/bias", shape)


def _distance(g: Recorder, key: Any, query: Any, shape: list[int | str]) -> Any:
    whole = g.op("Sub", [key, query], "mask/distance", shape, dtype="INT64")
    return g.op("Cast", [whole], "mask/distance_float", shape, to=int(g.dtype))


def _by_distance(g: Recorder, distance: Any, inputs: AttentionInputs, shape: Any) -> Any:
    """The bias of scores by distance, of the shape [B or 1, H, S, T]."""
    slopes = np.asarray(inputs.slopes, np.float32)[None, :, None, None]
    values = [distance, g.numbers(slopes, f"{inputs.name}/slopes")]
    return g.op("Mul", values, f"{inputs.name}/distance", shape)


def _group_query_attention(
    g: Recorder, inputs: AttentionInputs, values: list[Any], **attributes: Any
) -> Attended:
    cap = inputs.settings.score_cap
    attributes |= {} if cap is None else {"softcap": cap}
    if inputs.sinks is not None:
        values = [*values, *[None] * (_SINKS - len(values)), inputs.sinks]
    attended, key, value = g.ops(
        "GroupQueryAttention",
        values,
        inputs.name,
        _attended_shapes(inputs),
        domain=MICROSOFT,
        num_heads=inputs.layer.query_heads,
        kv_num_heads=inputs.layer.kv_heads,
        scale=inputs.settings.scores,
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


def _three(inputs: AttentionInputs) -> tuple[int, int, int]:
    """Heads of queries, keys and values."""
    return inputs.layer.query_heads, inputs.layer.kv_heads, inputs.layer.kv_heads


def _clipped(g: Recorder, part: Any, clip: float, name: str, width: int) -> Any:
    ends = [g.number(value, label) for value, label in ((-clip, "clip_low"), (clip, "clip_high"))]
    return g.op("Clip", [part, *ends], name, [BATCH, SEQUENCE, width])


def _split(g: Recorder, packed: Any, inputs: AttentionInputs) -> tuple[Any, Any, Any]:
    widths = [heads * inputs.head_dim for heads in _three(inputs)]
    sizes = g.constant(widths, f"{inputs.name}/widths")
    query, key, value = g.ops(
        "Split",
        [packed, sizes],
        f"{inputs.name}/split",
        [
            (f"{inputs.name}/{part}", [BATCH, SEQUENCE, width])
            for part, width in zip(("q", "k", "v"), widths, strict=True)
        ],
        axis=-1,
    )
    return query, key, value


def _prepared(
    g: Recorder, packed: Any, inputs: AttentionInputs, positions: Callable[[], Any]
) -> tuple[Any, Any, Any]:
    """Queries, keys and values apart, with all that is done to them but for their rotation."""
    clip, norms = inputs.settings.clip, inputs.norms
    widths = [heads * inputs.head_dim for heads in _three(inputs)]
    if clip is not None and not norms:
        packed = _clipped(g, packed, clip, f"{inputs.name}/clipped", sum(widths))
    query, key, value = _split(g, packed, inputs)
    if norms:
        modules = (norms.query, norms.key)
        pair = zip(_heads((query, key), inputs), "qk", modules, strict=True)
        query, key = (
            _normed(g, part, norms, module, (inputs, heads, letter))
            for (part, _, heads), letter, module in pair
        )
    if clip is not None and norms:
        query, key, value = (
            _clipped(g, part, clip, f"{inputs.name}/{letter}_clipped", width)
            for part, letter, width in zip((query, key, value), "qkv", widths, strict=True)
        )
    factor = inputs.settings.computed.query_factor
    if factor:
        query = _scaled_by_place(g, query, inputs, factor, positions())
    return query, key, value


def _heads(pair: Sequence[Any], inputs: AttentionInputs) -> Iterator[tuple[Any, str, int]]:
    """Queries and keys, each with its name and its number of heads."""
    counts = (inputs.layer.query_heads, inputs.layer.kv_heads)
    yield from zip(pair, ("query", "key"), counts, strict=True)


def _normed(
    g: Recorder, part: Any, norms: HeadNorms, module: str, of: tuple[AttentionInputs, int, str]
) -> Any:
    """Queries or keys normalised head by head, or all at once."""
    inputs, count, letter = of
    name, dim = inputs.name, inputs.head_dim
    if norms.wide:
        return norms.norms(part, module, f"{name}/{letter}_norm", [BATCH, SEQUENCE, count * dim])
    shape: list[int | str] = [BATCH, SEQUENCE, count, dim]
    sizes = g.constant([0, 0, count, dim], f"heads_{count}")
    apart = g.op("Reshape", [part, sizes], f"{name}/{letter}_heads", shape)
    scaled = norms.norms(apart, module, f"{name}/{letter}_norm", shape)
    return g.op(
        "Reshape",
        [scaled, g.constant([0, 0, count * dim], f"flat_{count}")],
        f"{name}/{letter}_normed",
        [BATCH, SEQUENCE, count * dim],
    )


def _scaled_by_place(
    g: Recorder, query: Any, inputs: AttentionInputs, factor: Callable[[Any, Any], Any], at: Any
) -> Any:
    """Queries times the factor of their position."""
    settings = inputs.settings
    table: NDArray[Any] = factor(settings.stock, np.arange(settings.context_length))
    rows = g.numbers(np.asarray(table, np.float32)[:, None], "query_factors")
    shape: list[int | str] = [BATCH, SEQUENCE, 1]
    factors = g.op("Gather", [rows, at], f"{inputs.name}/factors", shape)
    width = inputs.layer.query_heads * inputs.head_dim
    return g.op("Mul", [query, factors], f"{inputs.name}/q_scaled", [BATCH, SEQUENCE, width])


def _rotated(g: Recorder, pair: Sequence[Any], inputs: AttentionInputs, at: Any) -> list[Any]:
    """Queries and keys, rotated by Microsoft's operator."""
    rotary, dim = inputs.rotary, inputs.head_dim
    assert rotary is not None
    return [
        g.op(
            "RotaryEmbedding",
            [part, at, rotary.cos, rotary.sin],
            f"{inputs.name}/rotated_{name}",
            [BATCH, SEQUENCE, heads * dim],
            domain=MICROSOFT,
            **_turning(rotary, dim, {"num_heads": heads}),
        )
        for part, name, heads in _heads(pair, inputs)
    ]


def _turning(
    rotary: Rotary, head_dim: int, where_partial: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Attributes of an operator that rotates: those that are not as by default."""
    partial: dict[str, Any] = {}
    if rotary.size != head_dim:
        partial = {"rotary_embedding_dim": rotary.size, **(where_partial or {})}
    return partial | ({"interleaved": 1} if rotary.interleaved else {})


def _total_length(g: Recorder, shared: Shared) -> Any:
    """Tokens in the longest row, int32 [] as GroupQueryAttention wants it."""
    length = g.op(
        "Shape", [shared.attention_mask], "mask/total_length", [1], dtype="INT64", start=1, end=2
    )
    scalar = g.op("Squeeze", [length], "mask/total_scalar32", [], dtype="INT64")
    return g.op("Cast", [scalar], "total_length", [], dtype="INT32", to=_INT32)


def _suffix(window: int | None) -> str:
    return "" if window is None else f"_{window}"


# Attention's number of the scores as its softmax reads them: of 1, revisions of the standard say
# different things.
_MASKED = 2
# Where GroupQueryAttention takes sinks among its inputs.
_SINKS = 11

# onnx.TensorProto's numbers of the types that Cast is told.
_INT32, _BOOL = 6, 9

"""MLPs with experts: by ONNX Runtime's own operator, or by operators of the standard alone.

Both compute for a token what it is routed to and nothing else. Microsoft's MoE has the softmax over
the router's outputs and the choice inside; what is chosen and weighed otherwise comes to it as
logarithms of weights, of which its softmax makes weights again. The standard has no such operator:
there every expert has two products of its own, of the rows of the tokens that are routed to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from spp_export.formats.onnx.activation import activated
from spp_export.formats.onnx.expert_weights import ENTERS, LEAVES, ExpertReader, MlpParts, mlp_parts
from spp_export.formats.onnx.names import initializer_name
from spp_export.formats.onnx.options import OnnxOptions
from spp_export.formats.onnx.projection import Projections
from spp_export.formats.onnx.recorder import BATCH, MICROSOFT, SEQUENCE, Dimension, Recorder
from spp_export.formats.onnx.weights import Part, table
from spp_export.formats.settings import Settings
from spp_export.models.checkpoint.checkpoint import Checkpoint

# Tokens of all rows, and each as often as it is routed to an expert.
TOKENS, ROUTED = "tokens", "routed_tokens"


class ExpertMlps:
    """Writes what layers with experts have in the place of an MLP."""

    def __init__(
        self,
        decoder: Checkpoint,
        options: OnnxOptions,
        settings: Settings,
        g: Recorder,
        project: Projections,
    ) -> None:
        self._decoder, self._options, self._settings = decoder, options, settings
        self._g, self._project = g, project
        self._hidden: list[Dimension] = [BATCH, SEQUENCE, decoder.shape.hidden_size]
        routing = settings.routing
        # ONNX Runtime's operator knows this gate alone.
        gate = settings.activation == "silu" or (routing is not None and routing.swiglu is not None)
        self._operator = options.attention != "standard" and gate

    def __call__(self, normed: Any, index: int) -> Any:
        """What the layer writes of `normed` [B,S,d]."""
        g, family = self._g, self._decoder.family
        assert family.experts is not None
        parts = mlp_parts(family.experts, self._decoder.shape.mlps[index])
        layer = _Layer(self, parts, index)
        written = layer.by_operator(normed) if self._operator else layer.by_products(normed)
        if not parts.beside:
            return written
        beside = self._beside(normed, parts, index)
        return g.op("Add", [written, beside], f"layers.{index}.mlp/written_both", self._hidden)

    def _beside(self, normed: Any, parts: MlpParts, index: int) -> Any:
        """The MLP that every token sees."""
        g, name = self._g, f"layers.{index}.mlp"
        gate, up, down = parts.beside
        inside, other = (self.linear(normed, module, index) for module in (gate, up))
        shape: list[Dimension] = [BATCH, SEQUENCE, self._decoder.tensor(gate, index).shape[0]]
        inside = activated(g, self._settings.activation, inside, name, shape, {})
        written = self.linear(g.op("Mul", [inside, other], name, shape), down, index)
        if not parts.beside_gate:
            return written
        gate = self.linear(normed, parts.beside_gate, index)
        factor = g.op("Sigmoid", [gate], f"{name}/gate", [BATCH, SEQUENCE, 1])
        return g.op("Mul", [written, factor], f"{name}/gated", self._hidden)

    def linear(self, x: Any, module: str, index: int) -> Any:
        """A product of its own."""
        bias = self._decoder.bias(module, index)
        weight = Part(self._decoder.tensor(module, index))
        biases = [Part(bias)] if bias is not None else []
        return self._project.linear(x, [weight], biases, f"layers.{index}.{module}")


class _Layer:
    """The experts of one layer."""

    def __init__(self, mlps: ExpertMlps, parts: MlpParts, index: int) -> None:
        decoder, settings = mlps._decoder, mlps._settings
        assert settings.routing is not None
        shape = decoder.shape
        self._mlps, self._parts, self._index, self._g = mlps, parts, index, mlps._g
        self._decoder, self._routing = decoder, settings.routing
        self._activation = settings.activation
        self._name = f"layers.{index}.experts"
        self._hidden = shape.hidden_size
        self._count = shape.experts_in(decoder.layers)[index]
        self._width = shape.expert_channels - decoder.layers[index].dropped_channels
        self._chosen = shape.experts_per_token
        self._reader = ExpertReader(
            decoder.family, decoder.tensors, index, parts, mlps._options.precision
        )
        self._each: list[Dimension] = [BATCH, SEQUENCE, self._count]
        self._few: list[Dimension] = [BATCH, SEQUENCE, self._chosen]
        self._one: list[Dimension] = [BATCH, SEQUENCE, 1]
        self._stream: list[Dimension] = [BATCH, SEQUENCE, self._hidden]

    def by_operator(self, x: Any) -> Any:
        """By Microsoft's MoE."""
        routing, total = self._routing, None
        logits = self._mlps.linear(x, self._parts.router, self._index)
        if not (self._plain and routing.normalised):
            chosen, weights = self._routed(logits)
            if not self._plain:
                logits = self._logarithms(logits, chosen, weights)
            if not routing.normalised or routing.floor is not None:
                total = self._sum(weights, "weight")
        rows = self._op(
            "Reshape",
            [logits, self._g.constant([-1, self._count], f"rows_{self._count}")],
            "rows",
            [TOKENS, self._count],
        )
        names = [(ENTERS, "weight"), (ENTERS, "bias"), (LEAVES, "weight"), (LEAVES, "bias")]
        stored = [self._all(*name, paired=True) for name in names]
        while stored[-1] is None:
            stored.pop()
        written = self._g.op(
            "MoE",
            [x, rows, *stored],
            self._name,
            self._stream,
            domain=MICROSOFT,
            k=self._chosen,
            # At 0 the operator gives zeros where it writes over its input (1.23 to 1.31).
            normalize_routing_weights=1,
            activation_type="swiglu",
            swiglu_fusion=1,  # gate and up of each channel side by side
            **self._swiglu,
        )
        if total is not None:
            return self._op("Mul", [written, total], "weighed", self._stream)
        return self._times(written, routing.factor, "weighed", self._stream)

    @property
    def _swiglu(self) -> dict[str, Any]:
        """The operator's attributes of its gate."""
        if self._routing.swiglu is None:
            return {"activation_alpha": 1.0, "activation_beta": 0.0}
        alpha, beta, limit = self._routing.swiglu
        return {"activation_alpha": alpha, "activation_beta": beta, "swiglu_limit": limit}

    def by_products(self, x: Any) -> Any:
        """By operators of the standard: tokens in the order of the experts that they are routed to,
        so that each expert has one product of its rows, and then in their own order again."""
        g, k, op = self._g, self._chosen, self._op
        logits = self._mlps.linear(x, self._parts.router, self._index)
        chosen, weights = self._routed(logits)
        flat = op("Reshape", [chosen, g.constant([-1], "flat")], "flat", [ROUTED], "INT64")
        column = g.constant(np.arange(self._count)[:, None], f"experts_{self._count}")
        pairs: list[Dimension] = [self._count, ROUTED]
        of_expert = op("Equal", [column, flat], "of_expert", pairs, "BOOL")
        ordered = op("NonZero", [of_expert], "ordered", [2, ROUTED], "INT64")
        expert, place = (
            op("Gather", [ordered, g.constant(row, name)], label, [ROUTED], "INT64", axis=0)
            for row, name, label in ((0, "zero", "expert"), (1, "one", "place"))
        )
        ones = op("Cast", [of_expert], "of_expert_int", pairs, "INT64", to=_INT64)
        axis = g.constant([1], "axis_1")
        sizes = op("ReduceSum", [ones, axis], "sizes", [self._count], "INT64", keepdims=0)
        token = op("Div", [place, g.constant(k, f"chosen_{k}")], "token", [ROUTED], "INT64")
        rows = [-1, self._hidden]
        tokens = op(
            "Reshape",
            [x, g.constant(rows, f"rows_{self._hidden}")],
            "tokens",
            [TOKENS, self._hidden],
        )
        moved = op("Gather", [tokens, token], "moved", [ROUTED, self._hidden], axis=0)
        inside = self._products(moved, sizes, expert, ENTERS, self._hidden, 2 * self._width)
        inside = self._inside(inside)
        written = self._products(inside, sizes, expert, LEAVES, self._width, self._hidden)
        return self._weighed(self._back(written, place), chosen, weights)

    def _products(
        self, rows: Any, sizes: Any, expert: Any, product: str, inputs: int, outputs: int
    ) -> Any:
        """Rows in the order of experts, times the weights of each's own: [N, outputs]."""
        g, name = self._g, f"{self._name}.{product}"
        numbers = range(self._count)
        parts = g.ops(
            "Split",
            [rows, sizes],
            f"{name}/split",
            [(f"{name}/rows_{number}", [self._tokens(number), inputs]) for number in numbers],
            axis=0,
        )
        made = []
        for number, part in zip(numbers, parts, strict=True):
            one = f"{self._name}.{number}.{product}"
            turned = self._reader.turned(product, number)
            weight = g.weight(f"{one}.weight", [inputs, outputs], turned)
            made.append(g.op("MatMul", [part, weight], one, [self._tokens(number), outputs]))
        shape: list[Dimension] = [ROUTED, outputs]
        whole = g.op("Concat", made, name, shape, axis=0)
        bias = self._all(product, "bias", paired=False)
        if bias is None:
            return whole
        more = g.op("Gather", [bias, expert], f"{name}/biases", shape, axis=0)
        return g.op("Add", [whole, more], f"{name}/biased", shape)

    def _tokens(self, expert: int) -> str:
        """How many tokens are routed to an expert: another number for each."""
        return f"tokens_{self._index}_{expert}"

    def _inside(self, both: Any) -> Any:
        """What a gate and an up [N,2F] give to the product that leaves: [N,F]."""
        g = self._g
        shape: list[Dimension] = [ROUTED, self._width]
        sizes = g.constant([self._width] * 2, f"halves_{self._width}")
        gate, up = g.ops(
            "Split",
            [both, sizes],
            f"{self._name}/halves",
            [(f"{self._name}/gate", shape), (f"{self._name}/up", shape)],
            axis=-1,
        )
        if self._routing.swiglu is None:
            bent = activated(g, self._activation, gate, self._name, shape, {})
        else:
            labels = ("alpha", "beta", "limit")
            alpha, beta, limit = (
                g.number(value, f"swiglu/{label}")
                for value, label in zip(self._routing.swiglu, labels, strict=True)
            )
            low = g.number(-self._routing.swiglu[2], "swiglu/low")
            gate = self._op("Min", [gate, limit], "gate_cut", shape)
            steep = self._op("Mul", [gate, alpha], "gate_steep", shape)
            sigmoid = self._op("Sigmoid", [steep], "gate_sigmoid", shape)
            bent = self._op("Mul", [gate, sigmoid], "gate_bent", shape)
            up = self._op("Clip", [up, low, limit], "up_cut", shape)
            up = self._op("Add", [up, beta], "up_more", shape)
        return self._op("Mul", [bent, up], "inside", shape)

    def _back(self, written: Any, place: Any) -> Any:
        """Rows [N,d] in the order of the tokens, as often as each is routed."""
        g, op = self._g, self._op
        length = op("Shape", [place], "length", [1], "INT64")
        count = op("Squeeze", [length], "count", [], "INT64")
        ends = [g.constant(0, "zero"), count, g.constant(1, "one")]
        here = op("Range", ends, "here", [ROUTED], "INT64")
        # A permutation: every element of what is scattered into is another one.
        order = op("ScatterElements", [place, place, here], "order", [ROUTED], "INT64", axis=0)
        return op("Gather", [written, order], "back", [ROUTED, self._hidden], axis=0)

    def _weighed(self, rows: Any, chosen: Any, weights: Any) -> Any:
        """The weighed sum of what the experts of each token write: [B,S,d]."""
        g, op = self._g, self._op
        size = op("Shape", [chosen], "size", [3], "INT64")
        hidden = g.constant([self._hidden], f"hidden_{self._hidden}")
        wide = op("Concat", [size, hidden], "wide", [4], "INT64", axis=0)
        shape: list[Dimension] = [*self._few, self._hidden]
        apart = op("Reshape", [rows, wide], "apart", shape)
        last = g.constant([-1], "last_axis")
        column = op("Unsqueeze", [weights, last], "column", [*self._few, 1])
        parts = op("Mul", [apart, column], "parts", shape)
        axis = g.constant([2], "axis_2")
        return op("ReduceSum", [parts, axis], "", self._stream, keepdims=0)

    @property
    def _plain(self) -> bool:
        """Whether experts are chosen and weighed by the softmax over the router's outputs alone."""
        grouped = self._decoder.shape.expert_groups > 1
        return self._routing.scores == "softmax" and not self._parts.correction and not grouped

    def _routed(self, logits: Any) -> tuple[Any, Any]:
        """The experts that each token is routed to [B,S,k], and their weights."""
        op, routing = self._op, self._routing
        if routing.scores == "softmax":
            scores = op("Softmax", [logits], "scores", self._each, axis=-1)
        else:
            scores = op("Sigmoid", [logits], "scores", self._each)
        by = scores
        if self._parts.correction:
            by = op("Add", [scores, self._correction()], "corrected", self._each)
        weights, chosen = self._best(self._in_groups(by), self._chosen, "best", self._few)
        if by is not scores:
            weights = op("GatherElements", [scores, chosen], "own", self._few, axis=-1)
        if routing.normalised:
            total = self._sum(weights, "chosen")
            if routing.floor is not None:
                floor = self._g.number(routing.floor, "weights/floor")
                total = op("Max", [total, floor], "chosen_at_least", self._one)
            weights = op("Div", [weights, total], "shares", self._few)
        return chosen, self._times(weights, routing.factor, "weights", self._few)

    def _correction(self) -> Any:
        decoder = self._decoder
        stored = decoder.tensors[decoder.family.layer_name(self._index, self._parts.correction)]
        name = initializer_name(decoder.family, stored.name)
        return self._g.weight(name, stored.shape, table(stored, self._mlps._options.precision))

    def _in_groups(self, scores: Any) -> Any:
        """Scores of experts in the best groups, and the lowest number of others: each group counts
        for the sum of its two best."""
        g, op, shape = self._g, self._op, self._decoder.shape
        groups = shape.expert_groups
        if groups == 1:
            return scores
        size = self._count // groups
        apart: list[Dimension] = [BATCH, SEQUENCE, groups, size]
        sizes = g.constant([0, 0, groups, size], f"groups_{groups}_{size}")
        rows = op("Reshape", [scores, sizes], "groups", apart)
        two, _ = self._best(rows, 2, "two", [BATCH, SEQUENCE, groups, 2])
        of_group: list[Dimension] = [BATCH, SEQUENCE, groups]
        axis = g.constant([3], "axis_3")
        sums = op("ReduceSum", [two, axis], "group_scores", of_group, keepdims=0)
        few: list[Dimension] = [BATCH, SEQUENCE, shape.chosen_groups]
        _, best = self._best(sums, shape.chosen_groups, "best_groups", few)
        row = op("Unsqueeze", [best, g.constant([2], "axis_2")], "group_row", [
            BATCH, SEQUENCE, 1, shape.chosen_groups], "INT64")  # fmt: skip
        column = g.constant(np.arange(groups)[:, None], f"experts_{groups}")
        pairs: list[Dimension] = [*of_group, shape.chosen_groups]
        same = op("Equal", [column, row], "group_same", pairs, "BOOL")
        ones = op("Cast", [same], "group_same_int", pairs, "INT64", to=_INT64)
        seen = op("ReduceSum", [ones, axis], "group_seen", [*of_group, 1], "INT64", keepdims=1)
        allowed = op("Cast", [seen], "group_allowed", [*of_group, 1], "BOOL", to=_BOOL)
        kept = op("Where", [allowed, rows, g.constant(g.lowest, "lowest")], "group_kept", apart)
        flat = g.constant([0, 0, self._count], f"all_{self._count}")
        return op("Reshape", [kept, flat], "in_groups", self._each)

    def _logarithms(self, logits: Any, chosen: Any, weights: Any) -> Any:
        """Of the weights of those chosen, and the lowest number for others: [B,S,E]."""
        op = self._op
        logs = op("Log", [weights], "logs", self._few)
        size = op("Shape", [logits], "logits_size", [3], "INT64")
        low = op("Expand", [self._g.constant(self._g.lowest, "lowest"), size], "low", self._each)
        return op("ScatterElements", [low, chosen, logs], "by_weight", self._each, axis=-1)

    def _best(
        self, scores: Any, count: int, label: str, shape: Sequence[Dimension]
    ) -> tuple[Any, Any]:
        """The highest scores along the last axis, and their places."""
        values, places = self._g.mixed(
            "TopK",
            [scores, self._g.constant([count], f"most_{count}")],
            f"{self._name}/{label}",
            [
                (f"{self._name}/{label}_scores", "", shape),
                (f"{self._name}/{label}_places", "INT64", shape),
            ],
            axis=-1,
        )
        return values, places

    def _sum(self, weights: Any, label: str) -> Any:
        last = self._g.constant([-1], "last_axis")
        return self._op("ReduceSum", [weights, last], f"{label}_sum", self._one, keepdims=1)

    def _times(self, x: Any, factor: float, label: str, shape: Sequence[Dimension]) -> Any:
        if factor == 1.0:
            return x
        number = self._g.number(factor, f"{self._name}/factor")
        return self._op("Mul", [x, number], label, shape)

    def _all(self, product: str, kind: str, *, paired: bool) -> Any:
        """The weights or biases of all experts; None where there are none."""
        if (product, kind) not in self._parts.routed:
            return None
        sizes = {ENTERS: (2 * self._width, self._hidden), LEAVES: (self._hidden, self._width)}
        shape = [self._count, *sizes[product][: 2 if kind == "weight" else 1]]
        read = self._reader.all(product, kind, self._count, paired=paired)
        return self._g.weight(f"{self._name}.{product}.{kind}", shape, read)

    def _op(
        self,
        kind: str,
        inputs: Sequence[Any],
        label: str,
        shape: Sequence[Dimension],
        dtype: str = "",
        **attributes: Any,
    ) -> Any:
        name = f"{self._name}/{label}" if label else self._name
        return self._g.op(kind, inputs, name, shape, dtype=dtype, **attributes)


# onnx.TensorProto's numbers of the types that Cast is told.
_INT64, _BOOL = 7, 9

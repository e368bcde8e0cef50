"""A decoder as an ONNX graph, node by node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from spp_export.formats.onnx.activation import activated
from spp_export.formats.onnx.attention import (
    AttentionInputs,
    HeadNorms,
    Rotary,
    Shared,
    attention_form,
)
from spp_export.formats.onnx.experts import ExpertMlps
from spp_export.formats.onnx.names import HEAD, initializer_name
from spp_export.formats.onnx.norms import Norms
from spp_export.formats.onnx.options import OnnxOptions, onnx_settings
from spp_export.formats.onnx.projection import Projections
from spp_export.formats.onnx.recorder import BATCH, MICROSOFT, PAST, SEQUENCE, TOTAL, Recorder
from spp_export.formats.onnx.weights import Part, table
from spp_export.formats.parts import HEADS, outputs_of
from spp_export.formats.settings import rotary_tables
from spp_export.models.checkpoint.checkpoint import Checkpoint
from spp_export.models.families import Feature, Role
from spp_export.models.shape import LayerShape

if TYPE_CHECKING:
    import onnx_ir as ir

COS_TABLE, SIN_TABLE = "cos_cache", "sin_cache"
# (opset, IR version) of each form: RMSNormalization needs 23, Attention with a past length 24.
_OPSETS = {"gqa": (23, 11), "gqa-bias": (23, 11), "standard": (24, 12)}


def build_graph(decoder: Checkpoint, options: OnnxOptions) -> ir.Model:
    """The decoder with a KV cache; weights are read when the model is written.

    Inputs and outputs have the names that optimum, onnxruntime-genai and transformers.js know;
    each layer's cache has its own number of heads in its shape.
    """
    g = Recorder(options.precision)
    builder = _Builder(decoder, options, g)
    builder.build()
    opset, ir_version = _OPSETS[options.attention]
    opsets = {"": opset}
    if options.attention != "standard" or options.quant:
        opsets[MICROSOFT] = 1
    metadata = {f"spp.{key}": str(value) for key, value in options.to_dict().items()}
    model: ir.Model = g.model(opsets, ir_version, {**metadata, "spp.layout": decoder.layout})
    return model


class _Builder:
    def __init__(self, decoder: Checkpoint, options: OnnxOptions, g: Recorder) -> None:
        self._decoder, self._options, self._g = decoder, options, g
        self._settings = settings = onnx_settings(decoder, options)
        self._project = Projections(g, options)
        self._norms = Norms(
            decoder,
            g,
            options.precision,
            settings.epsilon,
            fused=options.attention != "standard",
        )
        self._experts = ExpertMlps(decoder, options, settings, g, self._project)
        self._sparse = decoder.shape.sparse
        self._hidden: list[int | str] = [BATCH, SEQUENCE, decoder.shape.hidden_size]
        self._outputs_of: dict[LayerShape, Mapping[Role, slice | Sequence[int]]] = {}

    def build(self) -> None:
        g, decoder = self._g, self._decoder
        shared, caches = self._inputs()
        rotary = self._rotary()
        form = attention_form(self._options.attention, g, shared)
        embedding = decoder.tensor(decoder.family.embedding)
        stream = self._embed(shared, embedding, form.positions)
        added = None
        presents: dict[int, Sequence[Any]] = {}
        for index, layer in enumerate(decoder.layers):
            attention = None
            if layer.has_attention:
                kind = self._settings.rotated[index]
                inputs = AttentionInputs(
                    past=caches[index],
                    layer=layer,
                    head_dim=decoder.shape.head_dim,
                    settings=self._settings,
                    window=self._settings.windows[index],
                    rotary=None if kind is None else rotary[kind],
                    slopes=self._settings.slopes[index],
                    norms=self._head_norms(index),
                    sinks=self._sinks(index),
                    name=f"layers.{index}.attention",
                )
                attention = partial(self._attention, index=index, form=form, inputs=inputs)
            make = self._layer if attention and self._has_mlp(index) else self._partial_layer
            stream, added, pair = make(index, stream, added, attention)
            if pair:
                presents[index] = pair
        normed = self._final(stream, added)
        self._outputs(self._logits(normed, embedding), presents)

    def _attention(
        self, normed: Any, index: int, form: Any, inputs: AttentionInputs
    ) -> tuple[Any, tuple[Any, Any]]:
        """What attention adds to the stream, and the layer's cache."""
        packed = self._linear(normed, HEADS, index, "qkv_proj")
        attended, key, value = form(packed, inputs)
        width = inputs.layer.query_heads * inputs.head_dim
        attended = self._inside(attended, "Q", index, width)
        written = self._linear(attended, (Role.OUTPUT,), index, "o_proj")
        return self._write(written, index, 0, "attention"), (key, value)

    def _partial_layer(
        self, index: int, stream: Any, added: Any, attention: Any
    ) -> tuple[Any, Any, tuple[Any, ...]]:
        """As `_layer`, of a layer that has no attention, no MLP or neither."""
        family, cache = self._decoder.family, ()
        parallel = Feature.PARALLEL in family.features
        if attention:
            normed, stream = self._norm(stream, added, family.attention_norm, index)
            added = None
            written, cache = attention(normed)
        else:
            written = self._bias_alone(stream, Role.OUTPUT, index, 0, "attention")
        if not self._has_mlp(index):
            if parallel and not attention and not family.mlp_norm:
                # The checkpoint has the norm that both would read; here nothing reads it.
                _, stream = self._norm(stream, added, family.attention_norm, index)
                added = None
            both = self._sum(added, written, f"layers.{index}.attention/added")
            written = self._bias_alone(stream, Role.DOWN, index, 1, "mlp")
            return stream, self._sum(both, written, f"layers.{index}.mlp/added"), cache
        before = None if parallel else written
        added = self._sum(added, before, f"layers.{index}.attention/added")
        norm = family.mlp_norm or (family.attention_norm if parallel else "")
        normed, stream = self._norm(stream, added, norm, index)
        both = self._write(self._mlp(normed, index), index, 1, "mlp")
        if parallel:
            both = self._sum(both, written, f"layers.{index}.mlp/added")
        return stream, both, cache

    def _has_mlp(self, index: int) -> bool:
        return self._decoder.layers[index].has_mlp or self._sparse[index]

    def _bias_alone(self, stream: Any, role: Role, layer: int, which: int, name: str) -> Any:
        """What attention without heads, or an MLP without channels, adds to the stream: the bias of
        its last projection, through the norm, if any, that the family has there; None where there
        is neither."""
        family, g = self._decoder.family, self._g
        bias = self._decoder.bias(family.projection(role), layer)
        if bias is None and not family.write_norms:
            return None
        place = f"layers.{layer}.{'o_proj' if role is Role.OUTPUT else 'down_proj'}"
        written = g.op("Sub", [stream, stream], f"{place}/nothing", self._hidden)
        if bias is not None:
            value = g.weight(f"{place}.bias", bias.shape, table(bias, self._options.precision))
            written = g.op("Add", [written, value], f"{place}/biased", self._hidden)
        return self._write(written, layer, which, name)

    def _sum(self, one: Any, other: Any, name: str) -> Any:
        """Of two that may be None, which is nothing."""
        if one is None or other is None:
            return other if one is None else one
        return self._g.op("Add", [one, other], name, self._hidden)

    def _layer(
        self, index: int, stream: Any, added: Any, attention: Any
    ) -> tuple[Any, Any, tuple[Any, ...]]:
        """The stream after a layer, what is still to be added to it, and the layer's cache."""
        family = self._decoder.family
        normed, stream = self._norm(stream, added, family.attention_norm, index)
        written, cache = attention(normed)
        if Feature.PARALLEL in family.features:
            # What the MLP reads is the stream before attention, by a norm of its own or the same.
            if family.mlp_norm:
                normed, _ = self._norm(stream, None, family.mlp_norm, index)
            both = self._write(self._mlp(normed, index), index, 1, "mlp")
            added = self._g.op("Add", [written, both], f"layers.{index}/written", self._hidden)
            return stream, added, cache
        if Feature.POST_NORM in family.features:
            stream = self._after(stream, written, index, 0)
            written = self._write(self._mlp(stream, index), index, 1, "mlp")
            return self._after(stream, written, index, 1), None, cache
        normed, stream = self._norm(stream, written, family.mlp_norm, index)
        return stream, self._write(self._mlp(normed, index), index, 1, "mlp"), cache

    def _embed(self, shared: Shared, embedding: Any, positions: Any) -> Any:
        g, decoder, family = self._g, self._decoder, self._decoder.family
        tied = decoder.shape.tied_embeddings
        stream = self._project.embed(shared.input_ids, embedding, tied=tied)
        if decoder.shape.embedding_width != decoder.shape.hidden_size:
            stream = self._outside(stream, family.embedding_projections[0])
        stream = self._times(stream, self._settings.embedding, "embedding", self._hidden)
        if family.positions:
            stored = decoder.tensor(family.positions)
            name = initializer_name(family, stored.name)
            rows = g.weight(name, stored.shape, table(stored, self._options.precision))
            row = positions()
            if family.more_positions:
                more = g.constant(family.more_positions, "more_positions")
                shape: list[int | str] = [BATCH, SEQUENCE]
                row = g.op("Add", [row, more], "positions/rows", shape, dtype="INT64")
            place = g.op("Gather", [rows, row], "positions/embedded", self._hidden)
            stream = g.op("Add", [stream, place], "positions/added", self._hidden)
        if family.embedding_norm:
            stream = self._norms(stream, family.embedding_norm, "embedding/norm", self._hidden)
        if self._settings.computed.normed_embedding:
            stream = self._norms(stream, "", "embedding/norm", self._hidden)
        return stream

    def _final(self, stream: Any, added: Any) -> Any:
        """What the head reads."""
        shape, family = self._decoder.shape, self._decoder.family
        if family.final_norm:
            name = family.final_norm
            stream, _ = self._norms.after_adding(stream, added, name, name, self._hidden)
        elif added is not None:
            stream = self._g.op("Add", [stream, added], "final/stream", self._hidden)
        if shape.embedding_width != shape.hidden_size:
            return self._outside(stream, family.embedding_projections[1])
        return stream

    def _inputs(self) -> tuple[Shared, dict[int, tuple[Any, Any]]]:
        g, decoder = self._g, self._decoder
        ids = g.input("input_ids", "INT64", [BATCH, SEQUENCE])
        mask = g.input("attention_mask", "INT64", [BATCH, TOTAL])
        positions = None
        if self._options.attention != "gqa":
            positions = g.input("position_ids", "INT64", [BATCH, SEQUENCE])
        caches = {}
        for index, layer in enumerate(decoder.layers):
            if not layer.has_attention:
                continue
            shape: list[int | str] = [BATCH, layer.kv_heads, PAST, decoder.shape.head_dim]
            key, value = (
                g.input(f"past_key_values.{index}.{part}", "", shape) for part in ("key", "value")
            )
            caches[index] = key, value
        return Shared(ids, mask, positions), caches

    def _rotary(self) -> Mapping[str, Rotary]:
        """Rotary tables by kind of layer."""
        g, decoder, settings = self._g, self._decoder, self._settings
        kinds = dict.fromkeys(kind for kind in settings.rotated if kind is not None)
        made = {}
        for number, kind in enumerate(kinds):
            tables = rotary_tables(settings, decoder.family, decoder.shape.head_dim, kind)
            ending = f"_{number}" if number else ""
            cos, sin = (
                g.numbers(values, f"{name}{ending}")
                for values, name in zip(tables, (COS_TABLE, SIN_TABLE), strict=True)
            )
            made[kind] = Rotary(cos, sin, 2 * tables[0].shape[1], settings.computed.interleaved)
        return made

    def _outputs(self, logits: Any, presents: Mapping[int, Sequence[Any]]) -> None:
        g, shape = self._g, self._decoder.shape
        g.output(logits, "logits", [BATCH, SEQUENCE, shape.vocab_size])
        for index, pair in presents.items():
            heads = self._decoder.layers[index].kv_heads
            cache: list[int | str] = [BATCH, heads, TOTAL, shape.head_dim]
            for value, part in zip(pair, ("key", "value"), strict=True):
                g.output(value, f"present.{index}.{part}", cache)

    def _norm(self, stream: Any, added: Any, module: str, layer: int) -> tuple[Any, Any]:
        """The normed stream, and the stream itself with `added` in it; "" is no norm."""
        if not module:
            if added is not None:
                place = f"layers.{layer}/with/{added.name}"
                stream = self._g.op("Add", [stream, added], place, self._hidden)
            return stream, stream
        whole = self._decoder.family.layer_name(layer, module)
        return self._norms.after_adding(
            stream, added, whole, f"layers.{layer}.{module}", self._hidden
        )

    def _write(self, written: Any, layer: int, which: int, name: str) -> Any:
        """What attention or the MLP adds to the stream."""
        family = self._decoder.family
        if Feature.SANDWICH in family.features:
            module, flag = family.norms[which]
            if not flag or flag in self._decoder.shape.switches:
                whole = family.layer_name(layer, module)
                place = f"layers.{layer}.{module}"
                written = self._norms(written, whole, place, self._hidden)
        place = f"layers.{layer}.{name}/written"
        return self._times(written, self._settings.writes, place, self._hidden)

    def _after(self, stream: Any, written: Any, layer: int, which: int) -> Any:
        """The normed sum, which is the stream from then on."""
        module = self._decoder.family.norms[which][0]
        whole = self._decoder.family.layer_name(layer, module)
        place = f"layers.{layer}.{module}"
        return self._norms.after_adding(stream, written, whole, place, self._hidden)[0]

    def _sinks(self, layer: int) -> Any:
        family = self._decoder.family
        if Feature.SINKS not in family.features:
            return None
        (sinks,) = family.head_rows
        return self._fixed(layer, sinks)

    def _head_norms(self, layer: int) -> HeadNorms | None:
        family, computed = self._decoder.family, self._settings.computed
        if computed.normed_heads:
            return HeadNorms(self._norms, "", "")
        names = (family.query_norm, family.key_norm)
        wide = names[0] in family.wide_norms
        if not (self._decoder.shape.qk_norm or wide):
            return None
        query, key = (family.layer_name(layer, name) for name in names)
        return HeadNorms(self._norms, query, key, wide)

    def _inside(self, x: Any, counts: str, layer: int, width: int) -> Any:
        """What comes out of attention ("Q") or of an MLP's channels ("C"), normalised all at once
        where the family does that."""
        family = self._decoder.family
        for module, form in family.wide_norms.items():
            if form == counts and module not in (family.query_norm, family.key_norm):
                shape: list[int | str] = [BATCH, SEQUENCE, width]
                whole = family.layer_name(layer, module)
                x = self._norms(x, whole, f"layers.{layer}.{module}", shape)
        return x

    def _mlp(self, normed: Any, layer: int) -> Any:
        if self._sparse[layer]:
            return self._experts(normed, layer)
        g, family = self._g, self._decoder.family
        name = f"layers.{layer}.mlp"
        width: list[int | str] = [BATCH, SEQUENCE, self._decoder.layers[layer].channels]
        kind = self._settings.activation
        gated = Feature.NO_GATE not in family.features
        inside = self._linear(
            normed, (Role.GATE if gated else Role.UP,), layer, "gate_proj" if gated else "up_proj"
        )
        up = self._linear(normed, (Role.UP,), layer, "up_proj") if gated else None
        constants = {tensor: self._fixed(layer, tensor) for tensor in family.fixed}
        inside = activated(g, kind, inside, name, width, constants)
        if up is not None:
            inside = g.op("Mul", [inside, up], name, width)
        inside = self._inside(inside, "C", layer, self._decoder.layers[layer].channels)
        return self._linear(inside, (Role.DOWN,), layer, "down_proj")

    def _fixed(self, layer: int, tensor: str) -> Any:
        stored = self._decoder.tensors[self._decoder.family.layer_name(layer, tensor)]
        name = initializer_name(self._decoder.family, stored.name)
        return self._g.weight(name, stored.shape, table(stored, self._options.precision))

    def _linear(self, x: Any, roles: Sequence[Role], layer: int, name: str) -> Any:
        decoder, family = self._decoder, self._decoder.family
        shape = decoder.layers[layer]
        if shape not in self._outputs_of:
            self._outputs_of[shape] = outputs_of(family, decoder.shape, shape)
        rows = self._outputs_of[shape]
        modules = [(family.projection(role), rows[role]) for role in roles]
        weights = [
            Part(decoder.tensor(module, layer), part, family.transposed) for module, part in modules
        ]
        biases = [(decoder.bias(module, layer), part) for module, part in modules]
        present = [Part(bias, part) for bias, part in biases if bias is not None]
        assert len(present) in (0, len(modules)), f"{name}: only some of its parts have a bias"
        return self._project.linear(x, weights, present, f"layers.{layer}.{name}")

    def _outside(self, x: Any, module: str) -> Any:
        return self._project.linear(x, [Part(self._decoder.tensor(module))], [], module)

    def _logits(self, normed: Any, embedding: Any) -> Any:
        g, decoder, settings = self._g, self._decoder, self._settings
        family, shape = decoder.family, decoder.shape
        bias = decoder.tensors.get(f"{family.head}.bias")
        if shape.tied_embeddings:
            logits = self._project.tied_head(normed, embedding)
        else:
            head = Part(decoder.tensor(family.head))
            logits = self._project.linear(normed, [head], [], HEAD)
        places: list[int | str] = [BATCH, SEQUENCE, shape.vocab_size]
        if bias is not None:
            value = g.weight(f"{HEAD}.bias", bias.shape, table(bias, self._options.precision))
            logits = g.op("Add", [logits, value], f"{HEAD}/biased", places)
        logits = self._times(logits, settings.logits, f"{HEAD}/scaled", places)
        if settings.logit_cap is None:
            return logits
        small = self._times(logits, 1 / settings.logit_cap, f"{HEAD}/of_cap", places)
        bent = g.op("Tanh", [small], f"{HEAD}/bent", places)
        return self._times(bent, settings.logit_cap, f"{HEAD}/capped", places)

    def _times(self, x: Any, factor: float, name: str, shape: Sequence[int | str]) -> Any:
        if factor == 1.0:
            return x
        return self._g.op("Mul", [x, self._g.number(factor, f"{name}/factor")], name, shape)

"""A decoder as an ONNX graph, node by node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spp_export.formats.onnx.attention import AttentionInputs, Shared, attention_form
from spp_export.formats.onnx.options import OnnxOptions
from spp_export.formats.onnx.projection import Projections
from spp_export.formats.onnx.recorder import BATCH, MICROSOFT, PAST, SEQUENCE, TOTAL, Recorder
from spp_export.formats.onnx.weights import rounded, table, vector
from spp_export.formats.settings import rotary_tables, settings_of
from spp_export.models.checkpoint.checkpoint import Checkpoint
from spp_export.models.checkpoint.header import StoredTensor

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
        self._settings = settings_of(decoder)
        self._project = Projections(g, options)
        self._hidden: list[int | str] = [BATCH, SEQUENCE, decoder.shape.hidden_size]

    def build(self) -> None:
        g, decoder, family = self._g, self._decoder, self._decoder.family
        shared, caches = self._inputs()
        form = attention_form(self._options.attention, g, shared)
        embedding = decoder.tensor(family.embedding)
        stream = self._project.embed(
            shared.input_ids, embedding, tied=decoder.shape.tied_embeddings
        )
        added = None
        presents: dict[int, list[Any]] = {}
        for index, layer in enumerate(decoder.layers):
            if layer.has_attention:
                normed, stream = self._norm(stream, added, family.attention_norm, index)
                packed = self._linear(
                    normed, (family.query, family.key, family.value), index, "qkv_proj"
                )
                attended, *presents[index] = form(
                    AttentionInputs(
                        packed=packed,
                        past=caches[index],
                        norms=self._norms(index),
                        layer=layer,
                        head_dim=decoder.shape.head_dim,
                        window=self._settings.windows[index],
                        epsilon=self._settings.epsilon,
                        name=f"layers.{index}.attention",
                    )
                )
                added = self._linear(attended, (family.output,), index, "o_proj")
            else:
                stream, added = self._bias_alone(stream, added, family.output, index, "o_proj")
            if layer.has_mlp:
                normed, stream = self._norm(stream, added, family.mlp_norm, index)
                added = self._mlp(normed, index)
            else:
                stream, added = self._bias_alone(stream, added, family.down, index, "down_proj")
        normed, _ = self._norm(stream, added, family.final_norm, None)
        self._outputs(self._head(normed, embedding), presents)

    def _bias_alone(
        self, stream: Any, added: Any, module: str, layer: int, name: str
    ) -> tuple[Any, Any]:
        """Stream and what is yet to be added to it, with the bias, if any, of the last projection
        of attention without heads, or of an MLP without channels."""
        bias = self._decoder.bias(module, layer)
        if bias is None:
            return stream, added
        g, place = self._g, f"layers.{layer}.{name}"
        value = g.weight(f"{place}.bias", bias.shape, vector([bias], self._options.precision))
        # What is to be added has the stream's shape, for the norm that adds it.
        biased = g.op(
            "Add", [stream if added is None else added, value], f"{place}/biased", self._hidden
        )
        return (biased, None) if added is None else (stream, biased)

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
        tables = rotary_tables(self._settings, decoder.family, decoder.shape.head_dim)
        cos, sin = (
            g.constant(rounded(values, self._options.precision), name)
            for values, name in zip(tables, (COS_TABLE, SIN_TABLE), strict=True)
        )
        return Shared(ids, mask, positions, cos, sin), caches

    def _outputs(self, logits: Any, presents: Mapping[int, Sequence[Any]]) -> None:
        g, shape = self._g, self._decoder.shape
        g.output(logits, "logits", [BATCH, SEQUENCE, shape.vocab_size])
        for index, pair in presents.items():
            heads = self._decoder.layers[index].kv_heads
            cache: list[int | str] = [BATCH, heads, TOTAL, shape.head_dim]
            for value, part in zip(pair, ("key", "value"), strict=True):
                g.output(value, f"present.{index}.{part}", cache)

    def _norm(self, stream: Any, added: Any, module: str, layer: int | None) -> tuple[Any, Any]:
        """The normed stream, and the stream itself with `added` in it."""
        g, precision = self._g, self._options.precision
        stored = self._decoder.tensor(module, layer)
        name = module if layer is None else f"layers.{layer}.{module}"
        weight = g.weight(f"{name}.weight", stored.shape, table(stored, precision))
        epsilon = self._settings.epsilon
        if added is not None and self._options.attention != "standard":
            normed, _, _, total = g.ops(
                "SkipSimplifiedLayerNormalization",
                [stream, added, weight],
                name,
                [(name, self._hidden), ("", None), ("", None), (f"{name}/stream", self._hidden)],
                domain=MICROSOFT,
                epsilon=epsilon,
            )
            return normed, total
        if added is not None:
            stream = g.op("Add", [stream, added], f"{name}/stream", self._hidden)
        normed = g.op(
            "RMSNormalization", [stream, weight], name, self._hidden, axis=-1, epsilon=epsilon
        )
        return normed, stream

    def _norms(self, layer: int) -> tuple[Any, Any] | None:
        if not self._decoder.shape.qk_norm:
            return None
        family, precision = self._decoder.family, self._options.precision
        pair = []
        for module in (family.query_norm, family.key_norm):
            stored = self._decoder.tensor(module, layer)
            name = f"layers.{layer}.{module}.weight"
            pair.append(self._g.weight(name, stored.shape, table(stored, precision)))
        return pair[0], pair[1]

    def _mlp(self, normed: Any, layer: int) -> Any:
        g, family = self._g, self._decoder.family
        name = f"layers.{layer}.mlp"
        width: list[int | str] = [BATCH, SEQUENCE, self._decoder.layers[layer].channels]
        gate = self._linear(normed, (family.gate,), layer, "gate_proj")
        up = self._linear(normed, (family.up,), layer, "up_proj")
        sigmoid = g.op("Sigmoid", [gate], f"{name}/sigmoid", width)
        silu = g.op("Mul", [gate, sigmoid], f"{name}/silu", width)
        return self._linear(
            g.op("Mul", [silu, up], name, width), (family.down,), layer, "down_proj"
        )

    def _linear(self, x: Any, modules: Sequence[str], layer: int, name: str) -> Any:
        weights = [self._decoder.tensor(module, layer) for module in modules]
        biases = [self._decoder.bias(module, layer) for module in modules]
        present: list[StoredTensor] = [bias for bias in biases if bias is not None]
        assert len(present) in (0, len(modules)), f"{name}: only some of its parts have a bias"
        return self._project.linear(x, weights, present, f"layers.{layer}.{name}")

    def _head(self, normed: Any, embedding: StoredTensor) -> Any:
        if self._decoder.shape.tied_embeddings:
            return self._project.tied_head(normed, embedding)
        head = self._decoder.tensor(self._decoder.family.head)
        return self._project.linear(normed, [head], [], "lm_head")

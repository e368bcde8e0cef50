"""What `show` says of a dense model: what can go, what stays and why, and what it can become."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

from spp_export.common.errors import PlanError, SppError
from spp_export.formats.format import Format
from spp_export.formats.promised import promised_checkpoint
from spp_export.formats.registry import FORMATS
from spp_export.models.checkpoint.checkpoint import Checkpoint
from spp_export.models.families import TensorSpec, Unit
from spp_export.models.shape import LAYOUTS, Layout, Units
from spp_export.planning import LayerPlan, Plan, dense_plan, sample_plan
from spp_export.planning.plan import only_existing

_UNITS = {
    "query": "query heads",
    "kv": "KV groups",
    "channel": "MLP channels",
    "expert": "experts",
}
# Why a part of a model stays as it is.
_EMBEDDINGS, _HEAD, _NORMS, _BIASES = "embeddings", "head", "norms", "biases of o and down"
_VISION = "tower of vision"
_WHY = {
    _EMBEDDINGS: "every token has a row, as wide as the stream, which stays as wide as it is",
    _HEAD: "every token has a row, as wide as the stream",
    _NORMS: "as wide as the stream, or as one head",
    _BIASES: "as wide as the stream",
    _VISION: "the decoder of text alone is cut",
}
_OTHER = "neither heads of softmax attention nor channels of one MLP"


def model_facts(source: Checkpoint) -> dict[str, Any]:
    """Facts about a dense checkpoint by name, in the order to show them."""
    shape = source.shape
    return {
        "model": source.name,
        "fingerprint": source.fingerprint,
        "family": shape.model_type,
        "computes": ", ".join(sorted(source.family.features)) or "what Llama does",
        "dtype": source.dtype_name,
        "layers": shape.num_layers,
        "query_heads": shape.query_heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_size": shape.hidden_size,
        "channels": shape.channels,
        "vocabulary": shape.vocab_size,
        "tied_embeddings": shape.tied_embeddings,
        "parameters": shape.parameters(shape.layers),
        "head_parameters": shape.head_parameters(shape.layers),
        "kv_bytes_per_token": shape.kv_bytes_per_token(shape.layers),
        "can_go": list(_can_go(source)),
        "stays": list(_stays(source)),
        "can_become": list(_can_become(source)),
    }


def _specs(source: Checkpoint) -> Iterator[TensorSpec]:
    return source.family.tensors(source.shape, source.layers)


def _can_go(source: Checkpoint) -> Iterator[dict[str, Any]]:
    """By unit: how many a layer has, in how many layers, and the parameters that go with them; of
    experts, how many channels of each can go as well."""
    inside = source.shape.expert_channels
    counts: dict[str, dict[int, int]] = {}
    elements: dict[str, int] = {}
    for spec in _specs(source):
        for unit, count, share in _units(spec):
            assert spec.layer is not None
            of_layers = counts.setdefault(unit, {})
            of_layers[spec.layer] = max(count, of_layers.get(spec.layer, 0))
            elements[unit] = elements.get(unit, 0) + share
    for name, of_layers in counts.items():
        yield {
            "unit": _UNITS.get(name, name),
            "in_a_layer": sorted(set(of_layers.values())),
            "layers": len(of_layers),
            "parameters": elements[name],
            **({"channels_of_each": [inside] * (name == Unit.EXPERT)} if inside else {}),
        }


def _units(spec: TensorSpec) -> Iterator[tuple[Unit, int, int]]:
    """The units that a tensor has parts of: how many there are, and its elements of theirs."""
    size = prod(spec.shape)
    if spec.expert is not None:
        yield Unit.EXPERT, spec.expert + 1, size
    elif spec.unit is not None and spec.axis is not None:
        length = spec.shape[spec.axis]
        for unit, count in spec.parts or ((spec.unit, length // spec.step),):
            yield unit, count, size * count * spec.step // length


def _stays(source: Checkpoint) -> Iterator[dict[str, Any]]:
    """By part: the parameters that no plan takes, and why."""
    elements: dict[str, int] = {}
    beside = {name for name, _ in source.shape.beside}
    for spec in _specs(source):
        if not list(_units(spec)):
            part = _VISION if spec.name in beside else _part(source, spec)
            elements[part] = elements.get(part, 0) + prod(spec.shape)
    for part, count in elements.items():
        yield {"part": part, "parameters": count, "why": _WHY.get(part, _OTHER)}


def _part(source: Checkpoint, spec: TensorSpec) -> str:
    family, mixers = source.family, source.shape.mixers
    module = spec.name.rpartition(".")[0]
    if spec.layer is None:
        if module in (family.final_norm, family.embedding_norm):
            return _NORMS
        return _HEAD if module == family.head else _EMBEDDINGS
    inside = module.removeprefix(f"{family.layers}.{spec.layer}.")
    own = (name for name, _ in mixers[spec.layer]) if mixers else ()
    if family.mixers and inside in family.mixers.modules and spec.name.endswith(tuple(own)):
        return family.mixers.name
    if inside in (family.output, family.down):
        return _BIASES
    norms = {family.attention_norm, family.mlp_norm, family.query_norm, family.key_norm}
    if inside in norms | {name for name, _ in family.norms}:
        return _NORMS
    return inside.partition(".")[0]


def _can_become(source: Checkpoint) -> Iterator[dict[str, Any]]:
    """By format and layout: whether it can, and what loads it or why not."""
    for made in FORMATS.values():
        for layout in LAYOUTS:
            can, how = _becomes(source, made, layout)
            yield {"format": made.name, "layout": layout, "can": can, "how": how}


def _becomes(source: Checkpoint, made: Format[Any], layout: Layout) -> tuple[bool, str]:
    pad = layout == "ragged" and not made.ragged
    try:
        plan = replace(_some_plan(source, layout), padded=pad)
        slim = promised_checkpoint(source, plan)
        made.require()
        files = made.prepare(made.options.chosen("cpu", {}, slim.shape), slim, plan)
    except SppError as error:
        return False, str(error).removeprefix(f"{source.path}: ")
    loading = ", ".join(engine.name for engine in files.engines if engine.loads != "no")
    return True, f"with --pad: {loading}" if pad else loading


def _some_plan(source: Checkpoint, layout: Layout) -> Plan:
    """One that only this layout can hold, or `uniform` as well. Raises PlanError where the family
    has none."""
    family, shape = source.family, source.shape
    dense = dense_plan(shape, source.fingerprint, source.name)
    if layout == "per-layer":
        units: Units = "both" if shape.has_mlps and not family.experts else "heads"
        return sample_plan(dense, shape, layout, "none", units)
    if layout == "uniform":
        layers = only_existing((_uniform_layer(source),) * shape.num_layers, shape)
    elif shape.group_size == 1 or shape.kv_heads == 1:
        raise PlanError("its KV groups cannot differ in size. Use layout per-layer.")
    elif not family.uneven_groups:
        raise PlanError(
            f"in the {shape.model_type} family every KV head must serve as many query heads. "
            "Use layout per-layer."
        )
    else:
        layers = tuple(replace(layer, query_heads=layer.query_heads[1:]) for layer in dense.layers)
    return replace(dense, layout=layout, layers=layers)


def _uniform_layer(source: Checkpoint) -> LayerPlan:
    """The layer with most heads below the dense one's that the stock config takes, or with half of
    the channels."""
    family, shape = source.family, source.shape
    accepts = family.stock_accepts(shape)
    for kv_heads in range(shape.kv_heads, 0, -1):
        for size in range(shape.group_size, 0, -1):
            if kv_heads * size < shape.query_heads and accepts(kv_heads * size):
                heads = (g * shape.group_size + i for g in range(kv_heads) for i in range(size))
                return LayerPlan(tuple(range(kv_heads)), tuple(heads))
    if not shape.has_mlps or not family.keys.get("intermediate_size", "any"):
        raise PlanError("its stock config takes no other number of heads or channels.")
    every = tuple(range(shape.kv_heads)), tuple(range(shape.query_heads))
    return LayerPlan(*every, tuple(range(max(1, shape.channels // 2))))

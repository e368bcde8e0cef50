"""What a tiny random model computes otherwise than Llama, off what its modules read and write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from spp_export.common.errors import ModelError
from spp_export.evaluation.contract import tokens
from spp_export.evaluation.guessing.stock import HEADS, HIDDEN
from spp_export.evaluation.guessing.tree import Tree
from spp_export.models.families import Family, Feature, Role
from spp_export.models.shape import ModelShape

# Rotary settings that a table of cosines and sines by position can hold.
_ROTARY_KEYS = {
    *("rope_theta", "rope_type", "type", "factor", "low_freq_factor", "high_freq_factor"),
    *("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
    *("mscale", "mscale_all_dim", "truncate"),
}
# What a norm over all heads of a role counts, where it comes before attention.
_UNITS = {Role.QUERY: "Q", Role.KEY: "K", Role.VALUE: ""}
# Below it, differences are rounding: some classes compute parts in float32.
_ROUNDING = 1e-5


@dataclass
class Call:
    """What a module read and wrote when it was first called, its other arguments, and when that
    was; `last` is what it wrote when it was last called, and when."""

    reads: Tensor
    writes: Tensor
    others: Mapping[str, Any]
    place: int
    last: tuple[Tensor, int]


Calls = Mapping[str, Call]


@torch.no_grad()
def _watched(model: nn.Module) -> tuple[Calls, Tensor]:
    """The calls of each module, by its name, and the logits of some tokens."""
    calls: dict[str, Call] = {}
    begun: dict[str, tuple[Tensor, Mapping[str, Any], int]] = {}
    place = count()

    def before(name: str, args: Any, kwargs: Mapping[str, Any]) -> None:
        values = args[0] if args else kwargs.get("hidden_states")
        if isinstance(values, Tensor) and name not in begun:
            begun[name] = values.clone(), kwargs, next(place)

    def after(name: str, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor) and name in begun:
            reads, kwargs, started = begun[name]
            writes = calls[name].writes if name in calls else first.clone()
            calls[name] = Call(reads, writes, kwargs, started, (first.clone(), next(place)))

    handles = []
    for name, module in model.named_modules():
        handles += [
            module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: before(name, args, kwargs), with_kwargs=True
            ),
            module.register_forward_hook(lambda _, args, out, name=name: after(name, out)),
        ]
    try:
        return calls, model(tokens(), use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


def computing(family: Family, tree: Tree, model: nn.Module, config: Any) -> Family:
    """The family with its norms in their places, and with the features that show in what a random
    `model` of this tiny config computes. Raises ModelError for a norm that no record has a place
    for."""
    calls, logits = _watched(model)
    family, features = _norms_in_place(family, tree, calls)
    features |= _of_norms(family, tree, model)
    features |= _of_mlp(family, calls)
    features |= _of_stream(family, model, calls, logits)
    if family.query == family.key:
        features.add(Feature.FUSED)
    if family.transposed:
        features.add(Feature.TRANSPOSED)
    if family.head_rows:
        features.add(Feature.SINKS)
    if family.positions:
        features.add(Feature.POSITIONS)
    if family.wide_norms:
        features.add(Feature.WIDE_NORM)
    per_head = _per_head(calls[family.layer_name(0, family.attention)].others)
    if per_head:
        features.add(Feature.ALIBI)
    if family.side_by_side:
        features.add(Feature.SIDE_BY_SIDE)
    family = replace(family, per_head=per_head)
    settings = config.to_dict()
    shape = family.of(settings).read_shape(settings, element_bytes=8)
    features |= _of_attention(family, shape, model, calls, config)
    return replace(family, features=frozenset(features))


def _same(one: Tensor, other: Tensor) -> bool:
    if one.numel() != other.numel():
        return False
    return bool((one.flatten() - other.flatten()).abs().max() <= _ROUNDING)


def _norms_in_place(family: Family, tree: Tree, calls: Calls) -> tuple[Family, set[Feature]]:
    layer = f"{family.layers}.0"
    norms = sorted(
        (name for name in tree.norms if f"{layer}.{name}" in calls),
        key=lambda name: calls[f"{layer}.{name}"].place,
    )

    def before(module: str) -> str:
        reads = calls[f"{layer}.{module}"].reads
        return next((n for n in norms if _same(calls[f"{layer}.{n}"].writes, reads)), "")

    attention_norm, mlp_norm = before(family.query), before(family.gate or family.up)
    stream = calls[layer].reads
    features = set()
    if attention_norm and (
        mlp_norm == attention_norm
        or (mlp_norm and _same(calls[f"{layer}.{mlp_norm}"].reads, stream))
    ):
        features.add(Feature.PARALLEL)
        mlp_norm = "" if mlp_norm == attention_norm else mlp_norm
    others = [name for name in norms if name not in (attention_norm, mlp_norm)]
    writers = (family.attention, family.output, family.down, family.down.rpartition(".")[0])
    writes = [calls[f"{layer}.{name}"].writes for name in writers if f"{layer}.{name}" in calls]
    sandwich = [
        name
        for name in others
        if any(_same(calls[f"{layer}.{name}"].reads, values) for values in writes)
    ]
    if others:
        features.add(Feature.SANDWICH if sandwich else Feature.POST_NORM)
    if others and (len(others) != 2 or sandwich not in ([], others)):
        raise ModelError(
            f"of its norms {', '.join(others)} stand elsewhere than before attention and MLP, or "
            "after both."
        )
    if not attention_norm and not _same(calls[f"{layer}.{family.query}"].reads, stream):
        raise ModelError("attention reads neither the stream nor what a norm of its layer gives.")
    first, outside = calls[layer].place, [name for name in tree.outside if name in calls]
    before_layers = [name for name in outside if calls[name].place < first]
    after_layers = [name for name in outside if calls[name].last[1] > first]
    if len(before_layers) > 1 or len(after_layers) > 1:
        raise ModelError(f"of its norms beside the layers, {', '.join(outside)}, records have two.")
    return replace(
        family,
        attention_norm=attention_norm,
        mlp_norm=mlp_norm,
        more_norms=tuple(others),
        embedding_norm="".join(before_layers),
        final_norm="".join(after_layers),
    ), features


def _of_norms(family: Family, tree: Tree, model: nn.Module) -> set[Feature]:
    names = [f"{family.layers}.0.{name}" for name in tree.norms] + list(tree.outside)
    if not names:
        return set()
    norm: Any = model.get_submodule(names[0])
    values = torch.randn(1, 1, HIDDEN, dtype=torch.float64)
    features = set()
    with torch.no_grad():
        if _same(norm(values), norm(values + 3)):
            features.add(Feature.LAYER_NORM)
        weight = getattr(norm, "weight", None)
        if weight is None:
            features.add(Feature.BARE_NORM)
            return features
        kept = weight.clone()
        weight.zero_()
        shift = norm(values) - (0 if getattr(norm, "bias", None) is None else norm.bias)
        weight.copy_(kept)
    if not _same(shift, torch.zeros_like(shift)):
        features.add(Feature.SHIFTED_NORM)
    return features


def _of_mlp(family: Family, calls: Calls) -> set[Feature]:
    if not family.gate:
        return {Feature.NO_GATE}
    gate, up, down = (
        calls[family.layer_name(0, name)] for name in (family.gate, family.up, family.down)
    )
    features = {Feature.FUSED} if family.gate == family.up else set()
    first, second = gate.writes, up.writes
    if family.gate == family.up:
        first, second = gate.writes.chunk(2, dim=-1)
    if not _same(down.reads, silu(first) * second):
        features.add(Feature.ACTIVATION)
    return features


def _of_stream(family: Family, model: nn.Module, calls: Calls, logits: Tensor) -> set[Feature]:
    features: set[Feature] = set()
    layer = calls[f"{family.layers}.0"]
    rows = model.get_parameter(f"{family.embedding}.weight")[tokens()]
    scaled = not _same(calls[family.embedding].writes, rows)
    if not family.positions:
        embedded = calls[family.embedding_norm or family.embedding].writes
        scaled |= not _same(layer.reads, embedded)
    norms = [calls[family.layer_name(0, name)].writes for name, _ in family.norms]
    writes = [calls[family.layer_name(0, name)].writes for name in (family.output, family.down)]
    if family.attention_norm or family.write_norms or len(norms) != 2:
        added = sum(x.view_as(layer.reads) for x in (norms or writes))
        scaled |= not _same(layer.writes, layer.reads + added)
    head = calls.get(family.head)
    if head is None:
        return features | {Feature.MULTIPLIERS, Feature.SOFTCAP}
    if family.final_norm:
        scaled |= not _same(head.reads, calls[family.final_norm].last[0])
    if not _same(head.writes, logits):
        ratio = logits / head.writes
        straight = bool((ratio - ratio.flatten()[0]).abs().max() <= _ROUNDING)
        scaled |= straight
        features |= set() if straight else {Feature.SOFTCAP}
    return features | ({Feature.MULTIPLIERS} if scaled else set())


def _per_head(others: Mapping[str, Any]) -> tuple[str, ...]:
    """Arguments of attention that have a part for every head: [B,H,S,T], [B*H,S,T] or [H,S,T]."""
    batch = len(tokens())
    return tuple(
        name
        for name, values in others.items()
        if isinstance(values, Tensor)
        and (
            (values.dim() == 4 and values.shape[1] == HEADS)
            or (values.dim() == 3 and values.shape[0] in (HEADS, batch * HEADS))
        )
    )


def _of_attention(
    family: Family, shape: ModelShape, model: nn.Module, calls: Calls, config: Any
) -> set[Feature]:
    """What attention computes otherwise than Llama's: nothing, where its output is that of plain
    attention with the cosines and sines that it is given, or without, by the positions in the
    stream."""
    features = set()
    cap = getattr(config, "attn_logit_softcapping", None)
    if hasattr(config, "attn_logit_softcapping") or hasattr(config, "final_logit_softcapping"):
        features.add(Feature.SOFTCAP)  # with another config.json, if not with this one
    rotary = _rotary(config)
    turned = bool(rotary) and rotary.keys() <= _ROTARY_KEYS
    wide = {form: name for name, form in family.wide_norms.items()}
    # A norm over all heads of what attention gives, if queries and keys have none.
    end = wide.get("Q", family.output) if "K" not in wide else family.output
    for layer, window in enumerate(family.windows(config, shape.num_layers)):
        module: Any = model.get_submodule(family.layer_name(layer, family.attention))
        scale = getattr(module, "scaling", None) or getattr(module, "scale", None)
        usual = shape.head_dim**-0.5
        if isinstance(scale, float) and abs(scale - usual) > _ROUNDING:
            features.add(Feature.MULTIPLIERS)
            usual = scale
        others = calls[family.layer_name(layer, family.attention)].others
        tables = others.get("position_embeddings") if turned else None
        first = calls[family.layer_name(0, family.attention)].others
        if tables is not None and not _same(tables[0], first["position_embeddings"][0]):
            features.add(Feature.ROTARY)  # by the type of the layer
        if family.per_head:
            continue
        if tables is None and not family.positions:
            features.add(Feature.ROTARY)
            continue
        attended = calls[family.layer_name(layer, end)].reads
        for factor in (usual, 1.0):
            plain = _plain(family, shape, model, calls, layer, tables, window, factor, cap)
            if plain is not None and _same(attended, plain):
                features |= {Feature.MULTIPLIERS} if factor != usual else set()
                break
        else:
            features.add(Feature.ROTARY)
    return features


def _rotary(config: Any) -> Mapping[str, Any]:
    """Rotary settings, which transformers 4 has in several places."""
    if hasattr(config, "rope_parameters"):
        return config.rope_parameters or {}
    if not hasattr(config, "rope_theta"):
        return {}
    partial = {"partial_rotary_factor"} & vars(config).keys()
    scaling = getattr(config, "rope_scaling", None) or {}
    return {"rope_theta": config.rope_theta, **scaling, **dict.fromkeys(partial)}


def _plain(
    family: Family,
    shape: ModelShape,
    model: nn.Module,
    calls: Calls,
    layer: int,
    tables: Sequence[Tensor] | None,
    window: int | None,
    scale: float,
    cap: float | None,
) -> Tensor | None:
    """Llama's attention [B,S,H*D] on what the projections wrote; None where the tables turn only a
    part of each head."""

    def heads(role: Role, norm: str) -> Tensor:
        written = calls[family.layer_name(layer, family.projection(role))].writes
        for name, form in family.wide_norms.items() if "K" in family.wide_norms.values() else ():
            if _UNITS[role] == form:
                written = model.get_submodule(family.layer_name(layer, name))(written)
        split = written[..., family.rows(role, shape)].unflatten(-1, (-1, shape.head_dim))
        if norm and shape.qk_norm:
            split = model.get_submodule(family.layer_name(layer, norm))(split)
        turned: Tensor = split.transpose(1, 2)
        return turned

    with torch.no_grad():
        query, key = heads(Role.QUERY, family.query_norm), heads(Role.KEY, family.key_norm)
        value = heads(Role.VALUE, "")
    if tables is not None:
        cos, sin = (table[:, None] for table in tables)
        if cos.shape[-1] != shape.head_dim:
            return None
        query, key = (x * cos + _halves_turned(x) * sin for x in (query, key))
    key, value = (x.repeat_interleave(shape.group_size, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    if cap is not None:
        scores = (scores / cap).tanh() * cap
    places = torch.arange(scores.shape[-1])
    distance = places[:, None] - places[None]
    hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
    attended: Tensor = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value
    return attended.transpose(1, 2).flatten(2)


def _halves_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)

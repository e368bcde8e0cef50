"""config.json of a slim checkpoint, from the source's. Plain dictionaries: no torch, no files."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from spp_export.common.errors import ModelError, PlanError
from spp_export.models.families import Family, Feature, Role
from spp_export.models.families.base import STOCK_LAYERS
from spp_export.models.shape import LayerShape, ModelShape, Units, common_size

# What travels in a per-layer or ragged checkpoint, beside its config.json.
MODELING_FILES: tuple[Path, ...] = tuple(
    Path(__file__).parents[1] / "models" / "modeling" / name
    for name in ("configuration_spp.py", "modeling_spp.py")
)

# Keys of a source that are about where it came from, or name code that we replace or refuse: who
# trusts the code of an export must not run another's.
_DROPPED = (
    "_name_or_path",
    "_commit_hash",
    "_attn_implementation",
    "attn_implementation",
    "experts_implementation",
    "auto_map",
    "custom_pipelines",
)


# What is said of a model as a whole, where its decoder's settings are a part of config.json.
_OF_THE_WHOLE = ("model_type", "architectures", "base_architecture", "auto_map")
_DEFAULT_ROPE_THETA = 10000.0
# Rotary settings that the config of some families has by another name.
_ROTARY = {"rope_theta", "partial_rotary_factor"}
_WIDTH = "intermediate_size"
# Counts of a layer for which the stock config has another name, and not both.
_OWN_KEYS = {"num_key_value_heads"}
# A rotation that only models have which transformers 4 has not.
_SINCE_5 = "proportional"
# Layer types of models that rotate by layer type, and what transformers 4.57 calls their theta.
_ROPE_BY_TYPE = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}


def slim_config(
    source_config: Mapping[str, Any],
    family: Family,
    shape: ModelShape,
    layers: Sequence[LayerShape],
    layout: str,
    biased: Collection[Role] = (),
    kept_heads: Sequence[Sequence[int]] = (),
) -> dict[str, Any]:
    """The parsed config.json of a checkpoint whose layers have the shapes `layers`.

    `uniform` gives a stock config. `per-layer` gives one for the classes in `MODELING_FILES`: the
    global counts stay those of the dense model `shape`, every layer's own are listed. `ragged` also
    lists how many consecutive query heads each KV head of a layer serves. The projections `biased`
    (OUTPUT, DOWN) have a bias (bias compensation): in `uniform` by the family's switch, which also
    gives biases to q, k and v, or to gate and up; in the others they are named, and no others get
    one. `kept_heads` are the query heads of every layer as the dense model numbers them, for
    families whose attention is given something of every head. Keys are sorted, so equal arguments
    give equal JSON.

    Raises PlanError for layers or biases the layout cannot express, ModelError for a source config
    that contradicts itself.
    """
    _check_layers(family, shape, layers, ragged=layout == "ragged" and family.uneven_groups)
    if family.inside:
        settings, alone = family.settings(source_config), replace(family, inside="")
        slim = slim_config(settings, alone, shape, layers, layout, biased, kept_heads)
        return _around(source_config, family, settings, slim)
    config = portable_config(source_config, family.rope_theta, family.rope_by_type)
    config["tie_word_embeddings"] = shape.tied_embeddings
    if family.derived_head_dim != "attention":
        config[family.keys.get("head_dim", "head_dim")] = shape.head_dim
    config |= family.settled
    for key in [key for key, value in family.settled.items() if value is None]:
        del config[key]
    if family.experts:
        config |= family.experts.counts(shape.experts)
    settings = config.get("rope_parameters") or {}
    for key in _ROTARY & family.keys.keys() & settings.keys():
        config[family.keys[key]] = settings[key]
    has_bias = {Role.OUTPUT: shape.output_bias, Role.DOWN: shape.mlp_bias}
    new = sorted(role for role in biased if not has_bias[role])
    if layout == "uniform":
        config |= _uniform(family, shape, layers)
        for layer, sparse in zip(layers, shape.sparse, strict=True):
            config |= _experts(family, shape, layer) if sparse else {}
        config |= {family.bias_switch(role): True for role in new}
    elif layout in ("per-layer", "ragged"):
        stock = family.stock_layers(source_config)
        config |= _per_layer(family, shape, layers, config, stock, ragged=layout == "ragged")
        config |= _for_vllm(family, shape, config)
        if family.per_head:
            config["per_layer_modules"] |= _per_head(family, shape, layers, kept_heads)
        if new:
            config["biased_projections"] = [family.projection(role) for role in new]
    else:
        raise PlanError(
            f"layout {layout!r} has no config; expected 'uniform', 'per-layer' or 'ragged'."
        )
    return dict(sorted(config.items()))


def _around(
    source_config: Mapping[str, Any],
    family: Family,
    settings: Mapping[str, Any],
    slim: dict[str, Any],
) -> dict[str, Any]:
    """config.json of a model with its decoder's settings inside, from both of its parts."""
    flat = family.inside not in source_config
    outside = source_config.keys() - (settings.keys() if flat else set())
    config = {key: source_config[key] for key in outside if key not in _DROPPED}
    whole = {key: slim.pop(key) for key in _OF_THE_WHOLE if key in slim}
    if "base_architecture" not in whole:  # the stock classes load it
        whole["model_type"] = source_config["model_type"]
    if "model_type" in settings:
        slim["model_type"] = settings["model_type"]
    config |= {**whole, family.inside: slim, "tie_word_embeddings": slim["tie_word_embeddings"]}
    dtypes = {key: source_config.get(key) for key in ("dtype", "torch_dtype")}
    if dtype := next(filter(None, dtypes.values()), None):
        config |= dict.fromkeys(dtypes, dtype)
    return dict(sorted(config.items()))


def portable_config(
    config: Mapping[str, Any],
    rope_theta: float | None = _DEFAULT_ROPE_THETA,
    rope_by_type: bool = False,
) -> dict[str, Any]:
    """A config.json that transformers 4.57 and 5.x read alike, from one that either wrote.

    5.x writes `rope_parameters`, which 4.57 ignores without a word and then rotates by the default
    theta; 4.57 writes `rope_theta` and `rope_scaling`. Both forms are given, as are `dtype` and
    `torch_dtype`. Paths and names of foreign code are left out. `rope_theta` is what the stock
    class takes where the source says nothing; None leaves rotary settings out there. Where layers
    rotate by their type (`rope_by_type`), what 4.57 wrote stays as it is, and 5.x reads it as well.

    Raises ModelError where the two forms of the source disagree.
    """
    result = {key: value for key, value in config.items() if key not in _DROPPED}
    if not rope_by_type or config.get("rope_parameters") is not None:
        result |= _rope(config, rope_theta)
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype is not None:
        result |= {"dtype": dtype, "torch_dtype": dtype}
    return result


def _check_layers(
    family: Family, shape: ModelShape, layers: Sequence[LayerShape], *, ragged: bool
) -> None:
    if len(layers) != shape.num_layers:
        raise PlanError(
            f"the plan has {len(layers)} layers and the model {shape.num_layers}. "
            "Make the plan for this checkpoint."
        )
    for index, layer in enumerate(layers):
        if not (layer.regular or (ragged and layer.groups)):
            raise PlanError(
                f"layer {index}: {layer.query_heads} query heads over {layer.kv_heads} KV heads is "
                "not a regular layer; every kept KV group must keep as many query heads. "
                "Use layout 'ragged'."
            )
    kinds: tuple[Units, Units] = ("heads", "channels")
    for units, emptied in zip(kinds, _emptied(shape, layers), strict=True):
        if any(emptied) and (reason := family.no_empty_layers(units)):
            raise PlanError(
                f"layer {emptied.index(True)}: the plan keeps no {units}, and {reason}. Keep some, "
                "as --no-allow-empty-layers does."
            )


def _uniform(family: Family, shape: ModelShape, layers: Sequence[LayerShape]) -> dict[str, Any]:
    first = common_size(layers)
    alike = shape.alike(first)
    odd = next((i for i, layer in enumerate(layers) if _sizes(layer) != _sizes(alike[i])), None)
    if odd is not None:
        raise PlanError(
            f"layer {odd} has {_sizes(layers[odd])}, the first has {_sizes(first)}; layout "
            "'uniform' needs all layers alike. Use layout 'per-layer'."
        )
    if first.query_heads == 0:  # of none that could go
        first = replace(first, query_heads=shape.query_heads, kv_heads=shape.kv_heads)
    if first.channels == 0:
        first = replace(first, channels=shape.channels)
    if len(counts := set(shape.experts_in(layers)) - {0}) > 1:
        raise PlanError(
            f"layers have {min(counts)} to {max(counts)} experts; layout 'uniform' needs as many "
            "in every layer that has any. Use layout 'per-layer'."
        )
    if len(widths := set(shape.expert_widths(layers))) > 1:
        raise PlanError(
            f"experts have {min(widths)} to {max(widths)} channels; layout 'uniform' needs as many "
            "in every layer that has any. Use layout 'per-layer'."
        )
    if widths - {shape.expert_channels} and family.experts and family.experts.beside:
        raise PlanError(
            f"layout 'uniform': the config of the {family.model_type} family gives experts and the "
            "MLPs beside them one width. Keep all channels of experts, or use layout 'per-layer'."
        )
    if not family.stock_accepts(shape)(first.query_heads):
        wanted = f"that divides hidden_size {shape.hidden_size}"
        if family.derived_head_dim:
            wanted = f"that of {shape.head_dim} elements each fills hidden_size {shape.hidden_size}"
        elif family.mixers and family.mixers.of_heads:
            wanted = f"of {shape.query_heads}, by which {family.mixers.name} are made"
        raise PlanError(
            f"layout 'uniform': {family.architecture} wants a number of query heads {wanted}, "
            f"the plan keeps {first.query_heads}. "
            "Keep another number, or use layout 'per-layer'."
        )
    if first.channels != shape.channels and not family.keys.get("intermediate_size", "any"):
        raise PlanError(
            f"layout 'uniform': the config of the {family.model_type} family has no width of the "
            "MLP. Keep all channels, or use layout 'per-layer'."
        )
    return {"architectures": [family.architecture], **family.counts(first)}


def _per_layer(
    family: Family,
    shape: ModelShape,
    layers: Sequence[LayerShape],
    config: Mapping[str, Any],
    stock: Mapping[str, dict[str, int]],
    *,
    ragged: bool,
) -> dict[str, Any]:
    prefix = family.architecture.removesuffix("ForCausalLM")
    config_class = family.config_class or f"{prefix}Config"
    decoder_class = family.decoder_class or f"{prefix}Model"
    digits = len(str(len(layers) - 1))
    of_others = family.width_key != _WIDTH
    width = config[_WIDTH] if of_others else None
    own_width = of_others and _narrows_mlps(shape, layers)
    sees = Feature.VISION in family.features
    auto = "AutoModelForImageTextToText" if sees else "AutoModelForCausalLM"
    return {
        "model_type": f"spp_{family.model_type}",
        "architectures": [f"Spp{family.architecture}"],
        "base_architecture": family.architecture,
        "auto_map": {
            "AutoConfig": f"configuration_spp.Spp{config_class}",
            "AutoModel": f"modeling_spp.Spp{decoder_class}",
            auto: f"modeling_spp.Spp{family.architecture}",
        },
        **_per_layer_modules(family, shape, layers),
        **_counts(shape.layer, width),
        "per_layer_config": {
            str(index).zfill(digits): _counts(_as_made(layer, index, shape), width)
            | ({family.width_key: layer.channels} if own_width and layer.channels else {})
            | (stock.get(str(index), {}) if index in shape.without_heads else {})
            | (_experts(family, shape, layer) if sparse else {})
            | ({"query_groups": list(layer.query_groups)} if ragged else {})
            for index, (layer, sparse) in enumerate(zip(layers, shape.sparse, strict=True))
        },
        **({STOCK_LAYERS: stock} if stock else {}),
        "serialize_explicit_per_layer_config": True,
        # The same once more, for readers that know lists only.
        "num_attention_heads_per_layer": [layer.query_heads for layer in layers],
        "num_key_value_heads_per_layer": [layer.kv_heads for layer in layers],
    }


def _per_layer_modules(
    family: Family, shape: ModelShape, layers: Sequence[LayerShape]
) -> dict[str, Any]:
    """What modeling_spp.py has to know of a family beyond the names that are Llama's, and of layers
    without attention or MLP."""
    derived = family.derived_head_dim == "attention"
    modules = _own_modules(family, shape, layers)
    kept: dict[str, Any] = {}
    if family.experts and any(layer.dropped_channels for layer in layers):
        kept = {"kept": list(family.experts.beside)} if family.experts.beside else {}
    if stays := _staying(family, shape, layers, modules):
        kept["stays"] = stays
    if not derived:
        listed: dict[str, Any] = {"layers": "layers", "modules": modules, **kept}
        if empty := _empty_modules(family, shape, layers):
            listed["empty"] = empty
        usual = listed == {"layers": "layers", "modules": ["self_attn", "mlp"]}
        return {} if usual and not family.experts else {"per_layer_modules": listed}
    inputs = list(dict.fromkeys((family.query, family.key, family.value)))
    alone = not family.experts  # else an MLP is made as wide as its layer's config says
    outputs = list(dict.fromkeys(name for name in (family.gate, family.up) if name and alone))
    return {
        "per_layer_modules": {
            "layers": family.layers.rpartition(".")[2],
            "modules": modules,
            **kept,
            # Made of a hidden size of so many heads, for want of another way to say head_dim.
            "narrow": {"inputs": inputs, "outputs": [family.output], "head_dim": shape.head_dim},
            # What is as wide as the MLP: at its outputs, at its inputs.
            "wide": {"outputs": outputs, "inputs": [family.down] if family.down and alone else []},
            "keys": {key: name for key, name in family.keys.items() if name and key in _OWN_KEYS},
        }
    }


def _own_modules(family: Family, shape: ModelShape, layers: Sequence[LayerShape]) -> list[str]:
    """The modules of a layer that are made by a config of its own."""
    modules = [family.attention]
    if family.experts:
        modules += family.experts.modules if _cuts_experts(layers) else ()
        narrower = _narrows_mlps(shape, layers)
    elif family.derived_head_dim == "attention":
        # More is as wide as the MLP than its projections.
        narrower = "C" in family.wide_norms.values()
    else:
        narrower = bool(family.mlp)
    return list(dict.fromkeys([*modules, family.mlp] if narrower else modules))


def _cuts_experts(layers: Sequence[LayerShape]) -> bool:
    return any(layer.dropped_experts or layer.dropped_channels for layer in layers)


def _narrows_mlps(shape: ModelShape, layers: Sequence[LayerShape]) -> bool:
    has = zip(layers, shape.has_channels, strict=True)
    return any(layer.channels < shape.channels for layer, has_mlp in has if has_mlp)


def _for_vllm(
    family: Family, shape: ModelShape, config: Mapping[str, Any]
) -> dict[str, float | int]:
    """Keys that vLLM's Transformers backend reads, and no stock class: the size of a head where it
    would divide the hidden size by a layer's heads, and what logits are multiplied by."""
    keys: dict[str, float | int] = {}
    if family.derived_head_dim == "attention":
        keys["hidden_size_per_head"] = shape.head_dim
    scale = config.get("logits_scaling")
    if family.scaled_logits and isinstance(scale, int | float) and scale:
        keys["logit_scale"] = scale if family.scaled_logits == "multiplied" else 1 / scale
    return keys


def _emptied(shape: ModelShape, layers: Sequence[LayerShape]) -> tuple[list[bool], list[bool]]:
    """Which layers lose their attention, and which their MLP."""
    attention = [
        has and not layer.has_attention for has, layer in zip(shape.has_heads, layers, strict=True)
    ]
    mlp = [has and not layer.has_mlp for has, layer in zip(shape.has_channels, layers, strict=True)]
    return attention, mlp


def _empty_modules(
    family: Family, shape: ModelShape, layers: Sequence[LayerShape]
) -> dict[str, Any]:
    """By the count that is 0 where a layer lost all: the module, its last projection, and the norms
    that go with it."""
    empty: dict[str, Any] = {}
    attention, mlp = map(any, _emptied(shape, layers))
    if attention:
        output = family.output.removeprefix(f"{family.attention}.")
        empty["num_attention_heads"] = [family.attention, output, list(family.attention_norms)]
    if mlp:
        output = family.down.removeprefix(f"{family.mlp}.")
        empty["intermediate_size"] = [family.mlp, output, list(family.mlp_norms)]
    return empty


def _staying(
    family: Family, shape: ModelShape, layers: Sequence[LayerShape], modules: Sequence[str]
) -> dict[str, list[int]]:
    """Per module, the layers in which it is something else, of which nothing is cut."""
    without = [(family.attention, shape.without_heads)]
    if not _cuts_experts(layers):
        without += [(family.down.rpartition(".")[0], shape.without_channels)]
    stays = {}
    for module in modules:
        lack = [places for name, places in without if name == module]
        if lack and (whole := lack[0].intersection(*lack)):
            stays[module] = sorted(whole)
    return stays


def _per_head(
    family: Family,
    shape: ModelShape,
    layers: Sequence[LayerShape],
    kept_heads: Sequence[Sequence[int]],
) -> dict[str, Any]:
    """What the attention of a family takes of every head, and which heads those of a layer were."""
    heads = [list(kept) for kept in kept_heads]
    if not heads and all(layer == shape.layer for layer in layers):
        heads = [list(range(shape.query_heads))] * len(layers)
    assert [len(kept) for kept in heads] == [layer.query_heads for layer in layers]
    names = list(family.per_head)
    return {"per_head": {"arguments": names, "heads": heads, "of": shape.query_heads}}


def _counts(layer: LayerShape, other_width: int | None) -> dict[str, int]:
    """`other_width`: of what has the usual key of MLPs in a stock config, if not these have it."""
    return {
        "num_attention_heads": layer.query_heads,
        "num_key_value_heads": layer.kv_heads,
        _WIDTH: layer.channels if other_width is None else other_width,
    }


def _as_made(layer: LayerShape, index: int, shape: ModelShape) -> LayerShape:
    """A layer with the dense model's counts of units that it does not have: other mixers may be
    made by these."""
    if index in shape.without_heads:
        layer = replace(layer, query_heads=shape.query_heads, kv_heads=shape.kv_heads)
    return replace(layer, channels=shape.channels) if index in shape.without_channels else layer


def _experts(family: Family, shape: ModelShape, layer: LayerShape) -> dict[str, int]:
    """The number of experts of a layer that has any, and their channels, where they are fewer than
    the dense model's."""
    if family.experts is None:
        return {}
    fewer = layer.dropped_experts
    counts = family.experts.counts(shape.experts - fewer) if fewer else {}
    narrower = layer.dropped_channels
    width = {family.experts.width: shape.expert_channels - narrower} if narrower else {}
    return counts | width


def _sizes(layer: LayerShape) -> str:
    return f"({layer.query_heads} query, {layer.kv_heads} KV, {layer.channels} channels)"


def _rope(config: Mapping[str, Any], theta: float | None) -> dict[str, Any]:
    """Both forms of the rotary settings; where the source names none, those of `theta`."""
    by_type = config.get("rope_parameters")
    if isinstance(by_type, Mapping) and by_type.keys() == _ROPE_BY_TYPE.keys():
        return _rope_by_type(by_type)
    new = _rope_settings(config, "rope_parameters")
    old = _rope_settings(config, "rope_scaling")
    for key in ("rope_theta", "partial_rotary_factor"):
        if config.get(key) is not None:
            old[key] = config[key]
    for key in new.keys() & old.keys():
        if new[key] != old[key]:
            raise ModelError(
                f"config.json: {key} is {new[key]!r:.40} in rope_parameters and {old[key]!r:.40} "
                "in rope_scaling or rope_theta. Keep the one the model was trained with."
            )
    if theta is None and "rope_theta" not in {*new, *old}:
        return {}
    settings = {"rope_theta": theta, "rope_type": "default", **new, **old}
    beside = ("rope_theta", "partial_rotary_factor")
    scaling = {key: value for key, value in settings.items() if key not in beside}
    return {
        "rope_parameters": settings,
        "rope_scaling": None if scaling == {"rope_type": "default"} else scaling,
        **{key: settings[key] for key in beside if key in settings},
    }


def _rope_by_type(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings of every layer type, and what 4.57 reads in their place."""
    old = {name: settings[kind].get("rope_theta") for kind, name in _ROPE_BY_TYPE.items()}
    whole = settings["full_attention"]
    if whole.get("rope_type") == _SINCE_5:
        return {"rope_parameters": settings}
    scaling = {key: value for key, value in whole.items() if key != "rope_theta"}
    default = scaling.get("rope_type", "default") == "default"
    return {
        "rope_parameters": settings,
        "rope_scaling": None if default else scaling,
        **{name: value for name, value in old.items() if value is not None},
    }


def _rope_settings(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping) or any(isinstance(v, Mapping) for v in value.values()):
        raise ModelError(
            f"config.json: {key} must be null or one flat object, got {value!r:.60}. "
            "Rotary settings per layer type are not supported."
        )
    settings = dict(value)
    if "type" in settings:  # the name before 4.43
        settings["rope_type"] = settings.pop("type")
    if settings.get("rope_type") == "mrope":  # transformers 4 knows this by the other name alone
        settings["rope_type"] = "default"
    return settings

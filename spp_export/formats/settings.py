"""What a decoder computes beside its sizes and weights: norms, factors, windows, rotary tables."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spp_export.common.errors import ModelError, reason_of
from spp_export.common.json_files import shown
from spp_export.common.progress import quiet_transformers
from spp_export.models.checkpoint.checkpoint import Checkpoint
from spp_export.models.families import Family, Feature
from spp_export.models.families.computed import Computed, Of, Routing, read
from spp_export.models.shape import ModelShape
from spp_export.slicing.config import portable_config

# By transformers' names, those of which other engines have an operator, or few make one.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "xielu": "xielu",
}


# Its factors depend on the length of what is read, which a table of positions cannot know.
_LENGTH_DEPENDENT = ("longrope", "su")


# A table of positions has half a kilobyte for each.
_MOST_POSITIONS = 1 << 22
_MOST_FACTOR = 1e6


# Keys that only the per-layer classes understand, or that the stock ones would refuse.
_OURS = ("model_type", "architectures", "per_layer_config", "serialize_explicit_per_layer_config")


Table = NDArray[np.float32]


@dataclass(frozen=True)
class Rotation:
    """A rotary embedding: angles per position [n/2] of the first n elements of a head, and the
    factor of their cosines and sines; `kind` is "default", "linear", "llama3", "yarn", ..."""

    frequencies: NDArray[np.float32]
    factor: float
    kind: str


@dataclass(frozen=True)
class Routed:
    """How experts are chosen and weighed, as of `Routing`."""

    scores: str
    normalised: bool
    floor: float | None
    factor: float
    swiglu: tuple[float, float, float] | None


@dataclass(frozen=True)
class Settings:
    """The settings that, beside the sizes, decide what a decoder computes.

    computed        the family's, in which the keys stand for what is here
    epsilon         of every norm
    activation      "silu", "gelu", "gelu_tanh", "relu", "relu2" or "xielu"
    context_length  positions the model was made for
    windows         per layer, how many last tokens attention sees; None is all of them
    embedding, writes, logits  factors, as of `Computed`
    scores          factor of the products of queries and keys
    score_cap, logit_cap, clip  None is none
    rotated         per layer, the kind of layer whose rotation it has ("" where all are alike);
                    None is none
    slopes          per layer, of the bias by distance of its own query heads; empty is none
    routing         to experts; None is none
    stock           the stock config
    """

    computed: Computed
    epsilon: float
    activation: str
    context_length: int
    windows: tuple[int | None, ...]
    embedding: float
    writes: float
    logits: float
    scores: float
    score_cap: float | None
    logit_cap: float | None
    clip: float | None
    rotated: tuple[str | None, ...]
    slopes: tuple[tuple[float, ...], ...]
    routing: Routed | None
    stock: Any


def settings_of(
    checkpoint: Checkpoint, known: Collection[Feature] = (), what: str = "this format"
) -> Settings:
    """Settings of a checkpoint that is to be written in a format of other engines.

    `known` are the features that the format `what` expresses. Raises ModelError for a model that it
    cannot.
    """
    for index, layer in enumerate(checkpoint.layers):
        if not layer.regular:
            raise ModelError(
                f"{checkpoint.path}: layer {index} has {layer.query_heads} query heads over "
                f"{layer.kv_heads} KV heads; this format needs the same number for every KV head. "
                "Export with --pad, or use layout 'per-layer'."
            )
    check_features(checkpoint.family, known, what)
    return stock_settings(checkpoint.config, checkpoint.family, checkpoint.shape, checkpoint.path)


def check_features(family: Family, known: Collection[Feature], what: str) -> None:
    """ModelError where a family computes something that the format `what` does not express, or
    nobody has told how."""
    for unknown in _unknown(family, known):
        family.refuse(unknown, what, "Export safetensors.")


def features_refusal(family: Family, known: Collection[Feature], what: str) -> str | None:
    """What `check_features` says begins with this; None where it says nothing."""
    refusals = (family.refusal(unknown, what) for unknown in _unknown(family, known))
    return next((refusal for refusal in refusals if refusal), None)


def _unknown(family: Family, known: Collection[Feature]) -> tuple[set[Feature], set[Feature]]:
    """What a format does not express of any family, and what it is not told of this one."""
    untold: set[Feature] = set() if family.computed else set(Feature)
    if family.computed and family.computed.slopes is None:
        untold.add(Feature.ALIBI)
    if family.computed and family.computed.routing is None:
        untold.add(Feature.EXPERTS)
    return set(Feature) - set(known), untold


def stock_settings(
    config: Mapping[str, Any], family: Family, shape: ModelShape, directory: Path
) -> Settings:
    """Settings of a parsed config.json, the source's or a slim checkpoint's.

    Raises ModelError for what neither PyTorch nor anything else could run by tables.
    """
    stock = _stock(config, family, shape, directory)
    computed = family.computed or Computed()
    for key in computed.unknown:
        if getattr(stock, key, None):
            raise ModelError(
                f"{directory}: {key} of config.json is {shown(getattr(stock, key))}, which only "
                "transformers computes. Export safetensors."
            )
    name = read(stock, computed.activation)
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise ModelError(
            f"{directory}: the activation {shown(name)} of config.json is not known here; "
            f"expected {', '.join(sorted(_ACTIVATIONS))}."
        )

    def number(setting: Of, default: float | None, most: float = _MOST_FACTOR) -> Any:
        value = read(stock, setting, default)
        return default if value is None else _number(value, setting, most, directory)

    epsilon = computed.epsilon
    windows = family.windows(stock, shape.num_layers)
    return Settings(
        computed=computed,
        epsilon=number((lambda _: epsilon) if isinstance(epsilon, float) else epsilon, 0.0, 1.0),
        activation=_ACTIVATIONS[name],
        context_length=int(number(computed.context, 0.0, _MOST_POSITIONS)),
        windows=tuple(computed.windows(stock)) if computed.windows else windows,
        embedding=number(computed.embedding, 1.0),
        writes=number(computed.writes, 1.0),
        logits=number(computed.logits, 1.0),
        scores=number(computed.scores, shape.head_dim**-0.5),
        score_cap=number(computed.score_cap, None),
        logit_cap=number(computed.logit_cap, None),
        clip=number(computed.clip, None),
        rotated=_rotated(stock, family, computed, shape, directory),
        slopes=_slopes(config, stock, computed, shape),
        routing=_routing(stock, computed.routing, number),
        stock=stock,
    )


def _stock(config: Mapping[str, Any], family: Family, shape: ModelShape, directory: Path) -> Any:
    """The config of the stock class."""
    from transformers import AutoConfig

    portable = portable_config(config, family.rope_theta, family.rope_by_type)
    values = {key: value for key, value in portable.items() if key not in _OURS}
    if family.derived_head_dim != "attention":
        values["head_dim"] = shape.head_dim
    values[family.keys.get("num_attention_heads", "num_attention_heads")] = shape.query_heads
    if family.heads_divide_hidden and shape.hidden_size % shape.query_heads:
        # A slim model's count, which the stock config would refuse; nothing here depends on it.
        values["num_attention_heads"] = values["num_key_value_heads"] = 1
    try:
        with quiet_transformers():
            return AutoConfig.for_model(family.model_type, **values)
    except Exception as error:  # each version of transformers has its own kinds
        raise ModelError(
            f"{directory}: config.json is refused by transformers: {reason_of(error)}"
        ) from error


def _number(value: Any, setting: Of, most: float, directory: Path) -> float:
    """A setting above 0 and at most `most`; ModelError for anything else."""
    if type(value) not in (int, float) or not 0 < value <= most:
        name = setting if isinstance(setting, str) else "a factor"
        raise ModelError(
            f"{directory}: {name} of config.json is {shown(value)}, expected a number above 0 and "
            f"at most {most:g}."
        )
    return float(value)


def _rotated(
    stock: Any, family: Family, computed: Computed, shape: ModelShape, directory: Path
) -> tuple[str | None, ...]:
    if family.features & {Feature.POSITIONS, Feature.ALIBI}:
        return (None,) * shape.num_layers
    by_type = _rotary_by_type(stock, family)
    for settings in by_type.values() or (_rotary_settings(stock),):
        kind = settings.get("rope_type", "default")
        if kind in _LENGTH_DEPENDENT:
            raise ModelError(
                f"{directory}: rotary scaling {kind!r} changes with the length of the text, "
                "which no table of positions can repeat. Export safetensors."
            )
    types = stock.layer_types if by_type else ("",) * shape.num_layers
    return tuple(
        kind if computed.rotates is None or computed.rotates(stock, layer) else None
        for layer, kind in enumerate(types[: shape.num_layers])
    )


def _slopes(
    config: Mapping[str, Any], stock: Any, computed: Computed, shape: ModelShape
) -> tuple[tuple[float, ...], ...]:
    if computed.slopes is None:
        return ((),) * shape.num_layers
    slopes = computed.slopes(stock)
    kept = (config.get("per_layer_modules") or {}).get("per_head")
    heads = kept["heads"] if kept else [range(len(slopes))] * shape.num_layers
    return tuple(tuple(float(slopes[head]) for head in layer) for layer in heads)


def _routing(
    stock: Any, routing: Routing | None, number: Callable[[Of, float | None], Any]
) -> Routed | None:
    if routing is None:
        return None
    normalised = routing.normalised
    if not isinstance(normalised, bool):
        normalised = bool(read(stock, normalised))
    floor, factor = number(routing.floor, None), number(routing.factor, 1.0)
    swiglu = None
    if routing.swiglu:
        alpha, beta, limit = (number(_always(x), None) for x in routing.swiglu(stock))
        swiglu = alpha, beta, limit
    return Routed(routing.scores, normalised, floor, factor, swiglu)


def _always(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


def _rotary_settings(stock: Any) -> Mapping[str, Any]:
    settings: Any = getattr(stock, "rope_parameters", None) or getattr(stock, "rope_scaling", None)
    return settings or {}


def _rotary_by_type(stock: Any, family: Family) -> dict[str, dict[str, Any]]:
    """Rotary settings by type of layer, where they differ in that; transformers 4.57 has no scaling
    for layers with a window, and may have another theta."""
    if not family.rope_by_type:
        return {}
    settings = _rotary_settings(stock)
    if settings and settings.keys() <= set(stock.layer_types):
        return {kind: dict(values) for kind, values in settings.items()}
    theta = stock.rope_theta
    local = getattr(stock, "rope_local_base_freq", theta)
    return {
        "full_attention": {"rope_type": "default", "rope_theta": theta, **settings},
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }


def rotation(settings: Settings, family: Family, head_dim: int, kind: str = "") -> Rotation:
    """The rotary embedding of the layers of a kind, as the family's own class has it."""
    stock, plain = settings.stock, settings.computed.rotary
    by_type = _rotary_by_type(stock, family)
    try:
        if plain:
            theta, size = plain(stock)
            angles = 1.0 / theta ** (np.arange(0, size, 2, dtype=np.float32) / size)
            return Rotation(angles.astype(np.float32), 1.0, "default")
        rotary = _llama_rotary(stock, by_type[kind], head_dim) if kind else _rotary(stock, family)
    except Exception as error:  # settings are used as they are, whatever they are
        raise ModelError(
            f"config.json: rotary settings are refused by transformers: {reason_of(error)}"
        ) from error
    scaling = by_type[kind] if kind else _rotary_settings(stock)
    return Rotation(
        rotary.inv_freq.float().numpy().copy(),
        float(rotary.attention_scaling),
        str(scaling.get("rope_type", "default")),
    )


def _rotary(stock: Any, family: Family) -> Any:
    import transformers

    prefix = family.architecture.removesuffix("ForCausalLM")
    modeling: Any = import_module(getattr(transformers, family.architecture).__module__)
    return getattr(modeling, f"{prefix}RotaryEmbedding")(config=stock)


def _llama_rotary(stock: Any, settings: Mapping[str, Any], head_dim: int) -> Any:
    """The class of a family without types of layers, which reads one flat object."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    flat = {
        "head_dim": head_dim,
        "max_position_embeddings": stock.max_position_embeddings,
        "rope_parameters": dict(settings),
    }
    return LlamaRotaryEmbedding(LlamaConfig(**portable_config(flat)))


def rotary_tables(
    settings: Settings, family: Family, head_dim: int, kind: str = ""
) -> tuple[Table, Table]:
    """Cosines and sines [context_length, n / 2] of `rotation`, the scaling of attention in them."""
    import torch

    turned = rotation(settings, family, head_dim, kind)
    positions = torch.arange(settings.context_length).float()
    angles = positions[:, None] * torch.from_numpy(turned.frequencies)[None]
    cos, sin = angles.cos() * turned.factor, angles.sin() * turned.factor
    if settings.computed.backwards:
        sin = -sin
    return cos.numpy(), sin.numpy()

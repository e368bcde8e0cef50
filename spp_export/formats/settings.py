"""The settings of a decoder beside sizes and weights: norms, windows, rotary tables."""

from __future__ import annotations

from collections.abc import Mapping
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
from spp_export.models.shape import ModelShape
from spp_export.slicing.config import portable_config

_ACTIVATIONS = ("silu", "swish")


# Its factors depend on the length of what is read, which a table of positions cannot know.
_LENGTH_DEPENDENT = ("longrope", "su")


# A table of positions has half a kilobyte for each.
_MOST_POSITIONS = 1 << 22


# Keys that only the per-layer classes understand, or that the stock ones would refuse.
_OURS = ("model_type", "architectures", "per_layer_config", "serialize_explicit_per_layer_config")


Table = NDArray[np.float32]


@dataclass(frozen=True)
class Settings:
    """The settings that, beside the sizes, decide what a decoder computes.

    epsilon         of every RMS norm
    context_length  positions the model was made for
    windows         per layer, how many last tokens attention sees; None is all of them
    rotary_type     "default", "linear", "llama3", "yarn", ...
    """

    epsilon: float
    context_length: int
    windows: tuple[int | None, ...]
    rotary_type: str
    stock: Any


def settings_of(checkpoint: Checkpoint) -> Settings:
    """Settings of a checkpoint that is to be written in a format of other engines.

    Raises ModelError for a model that no such format can express.
    """
    for index, layer in enumerate(checkpoint.layers):
        if not layer.regular:
            raise ModelError(
                f"{checkpoint.path}: layer {index} has {layer.query_heads} query heads over "
                f"{layer.kv_heads} KV heads; this format needs the same number for every KV head. "
                "Export with --pad, or use layout 'per-layer'."
            )
    return stock_settings(checkpoint.config, checkpoint.family, checkpoint.shape, checkpoint.path)


def stock_settings(
    config: Mapping[str, Any], family: Family, shape: ModelShape, directory: Path
) -> Settings:
    """Settings of a parsed config.json, the source's or a slim checkpoint's.

    Raises ModelError for what a graph of ours cannot express.
    """
    from transformers import AutoConfig

    family.refuse(tuple(Feature), "this format", "Export safetensors.")
    values = {k: v for k, v in portable_config(config, family.rope_theta).items() if k not in _OURS}
    values |= {"head_dim": shape.head_dim, "num_attention_heads": shape.query_heads}
    if family.heads_divide_hidden and shape.hidden_size % shape.query_heads:
        # A slim model's count, which the stock config would refuse; nothing here depends on it.
        values["num_attention_heads"] = values["num_key_value_heads"] = 1
    try:
        with quiet_transformers():
            stock: Any = AutoConfig.for_model(family.model_type, **values)
    except Exception as error:  # each version of transformers has its own kinds
        raise ModelError(
            f"{directory}: config.json is refused by transformers: {reason_of(error)}"
        ) from error
    if stock.hidden_act not in _ACTIVATIONS:
        raise ModelError(
            f"{directory}: hidden_act {shown(stock.hidden_act)} is not known here; "
            f"expected {' or '.join(_ACTIVATIONS)}."
        )
    rotary = (getattr(stock, "rope_parameters", None) or stock.rope_scaling) or {}
    rotary_type = str(rotary.get("rope_type", "default"))
    if rotary_type in _LENGTH_DEPENDENT:
        raise ModelError(
            f"{directory}: rotary scaling {rotary_type!r} changes with the length of the text, "
            "which no table of positions can repeat. Export safetensors."
        )
    return Settings(
        epsilon=_number(stock, "rms_norm_eps", 1.0, directory),
        context_length=int(_number(stock, "max_position_embeddings", _MOST_POSITIONS, directory)),
        windows=family.windows(stock, shape.num_layers),
        rotary_type=rotary_type,
        stock=stock,
    )


def _number(stock: Any, key: str, most: float, directory: Path) -> float:
    """A setting above 0 and at most `most`; ModelError for anything else."""
    value: Any = getattr(stock, key, None)
    if type(value) not in (int, float) or not 0 < value <= most:
        raise ModelError(
            f"{directory}: {key} of config.json is {shown(value)}, expected a number above 0 and "
            f"at most {most:g}."
        )
    return float(value)


def rotary_tables(settings: Settings, family: Family, head_dim: int) -> tuple[Table, Table]:
    """Cosines and sines [context_length, head_dim / 2] as the family's own rotary class has them.

    Scaling of frequencies and of attention is in them.
    """
    import torch

    rotary = _rotary(settings, family)
    with torch.no_grad():
        cos, sin = rotary(torch.zeros(1), torch.arange(settings.context_length)[None])
    half = head_dim // 2
    return cos[0, :, :half].numpy().copy(), sin[0, :, :half].numpy().copy()


def rotary_frequencies(settings: Settings, family: Family) -> tuple[NDArray[np.float64], float]:
    """Angles per position [head_dim / 2] and the factor of cosines and sines, of the same class."""
    rotary = _rotary(settings, family)
    return rotary.inv_freq.double().numpy().copy(), float(rotary.attention_scaling)


def _rotary(settings: Settings, family: Family) -> Any:
    import transformers

    prefix = family.architecture.removesuffix("ForCausalLM")
    try:
        model = getattr(transformers, family.architecture)
        modeling: Any = import_module(model.__module__)
        return getattr(modeling, f"{prefix}RotaryEmbedding")(config=settings.stock)
    except Exception as error:  # settings are used as they are, whatever they are
        raise ModelError(
            f"config.json: rotary settings are refused by transformers: {reason_of(error)}"
        ) from error

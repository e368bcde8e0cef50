"""Rotary scaling as llama.cpp has it, accepted only where it equals what transformers computes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spp_export.common.errors import ModelError
from spp_export.formats.gguf.architecture import Architecture, gguf_settings
from spp_export.formats.gguf.values import Metadata, count, real, text
from spp_export.formats.settings import Rotation, rotation
from spp_export.models.checkpoint.checkpoint import Checkpoint
from spp_export.slicing.config import portable_config

Floats = NDArray[np.float64]

# llama.cpp's, where the file says nothing.
_BETA_FAST, _BETA_SLOW = 32.0, 1.0
# The single precision that both compute frequencies in.
_TOLERANCE = 1e-5


def rotation_of(decoder: Checkpoint) -> Rotation:
    """The rotary embedding of the layers without a window, or of all; an empty one of none."""
    settings = gguf_settings(decoder)
    kinds = {kind for kind in settings.rotated if kind is not None}
    if not kinds:
        return Rotation(np.empty(0, np.float32), 1.0, "default")
    kind = next((kind for kind in kinds if kind == "full_attention"), min(kinds))
    return rotation(settings, decoder.family, decoder.shape.head_dim, kind)


def rotary_metadata(decoder: Checkpoint, architecture: Architecture) -> Metadata:
    """The keys of the rotary embedding. Raises ModelError for a scaling llama.cpp has not."""
    name, settings, turned = architecture.name, gguf_settings(decoder), rotation_of(decoder)
    dim = 2 * len(turned.frequencies)
    if not dim:
        return {}
    theta, scaling = _theta(decoder), _scaling_of(decoder)
    metadata = {
        f"{name}.rope.dimension_count": count(dim),
        f"{name}.rope.freq_base": real(theta),
    }
    if architecture.slides:
        local = _config(decoder).get("rope_local_base_freq")
        metadata[f"{name}.rope.freq_base_swa"] = real(float(local or theta))
    kind = turned.kind
    plain = theta ** (-np.arange(0, dim, 2) / dim)
    if kind == "default":
        _compare(decoder, plain, 1.0)
    elif kind == "linear":
        factor = float(scaling["factor"])
        _compare(decoder, plain / factor, 1.0)
        metadata |= _scaling(name, kind, factor)
    elif kind == "yarn":
        factor = float(scaling["factor"])
        original = int(scaling.get("original_max_position_embeddings") or settings.context_length)
        frequencies = _yarn(plain, theta, factor, original)
        _compare(decoder, frequencies, 1 + 0.1 * math.log(factor))
        metadata |= _scaling(name, kind, factor)
        metadata[f"{name}.rope.scaling.original_context_length"] = count(original)
    elif not (kind == "llama3" and architecture.frequencies):
        raise ModelError(
            f"GGUF: llama.cpp's {name} has no rotary scaling {kind!r:.40}. "
            "Export safetensors or ONNX."
        )
    return metadata


def _theta(decoder: Checkpoint) -> float:
    settings = gguf_settings(decoder)
    if settings.computed.rotary:
        return settings.computed.rotary(settings.stock)[0]
    return float(_config(decoder)["rope_theta"])


def _scaling_of(decoder: Checkpoint) -> Mapping[str, Any]:
    return _config(decoder)["rope_scaling"] or {}


def _config(decoder: Checkpoint) -> Mapping[str, Any]:
    stock: Any = gguf_settings(decoder).stock
    family = decoder.family
    return portable_config(stock.to_dict(), family.rope_theta, family.rope_by_type)


def frequency_factors(decoder: Checkpoint) -> NDArray[np.float32] | None:
    """What the plain frequencies are divided by [head_dim / 2], for a scaling given that way."""
    turned = rotation_of(decoder)
    if turned.kind != "llama3":
        return None
    dim = 2 * len(turned.frequencies)
    plain = _theta(decoder) ** (-np.arange(0, dim, 2) / dim)
    if turned.factor != 1.0:
        raise ModelError(
            f"GGUF: llama3 scaling with attention factor {turned.factor} is not known."
        )
    factors: NDArray[np.float32] = (plain / turned.frequencies.astype(np.float64)).astype(
        np.float32
    )
    return factors


def _scaling(name: str, kind: str, factor: float) -> Mapping[str, Any]:
    return {
        f"{name}.rope.scaling.type": text(kind),
        f"{name}.rope.scaling.factor": real(factor),
    }


def _yarn(plain: Floats, theta: float, factor: float, original: int) -> Floats:
    """Frequencies between plain and divided by `factor`, by how often each turns in the original
    context."""
    dim = 2 * len(plain)

    def position(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(0, math.floor(position(_BETA_FAST)))
    high = min(dim - 1, math.ceil(position(_BETA_SLOW)))
    ramp = np.clip((np.arange(len(plain)) - low) / max(0.001, high - low), 0, 1)
    blended: Floats = plain * (1 - ramp) + plain / factor * ramp
    return blended


def _compare(decoder: Checkpoint, frequencies: Floats, attention: float) -> None:
    turned = rotation_of(decoder)
    expected = turned.frequencies.astype(np.float64)
    same = expected.shape == frequencies.shape and np.allclose(
        expected, frequencies, rtol=_TOLERANCE, atol=0
    )
    if not same or not math.isclose(turned.factor, attention, rel_tol=_TOLERANCE):
        raise ModelError(
            f"GGUF: rotary scaling {turned.kind!r:.40} has settings that "
            "llama.cpp takes otherwise than transformers does. Export safetensors or ONNX."
        )

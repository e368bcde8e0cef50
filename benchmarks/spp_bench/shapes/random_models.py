"""Dense and slim models of random weights, made on the device: nothing is read or downloaded.

A slim model's weights are slices of the dense one's, and share its memory where nothing is cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import spp_export.models.modeling  # noqa: F401  registers the per-layer classes
from spp_bench.shapes.shapes import Published
from spp_export.common.progress import quiet_transformers
from spp_export.models.families import TensorSpec
from spp_export.models.shape import LayerShape
from spp_export.planning import Plan
from spp_export.slicing.cut import kept_indices, kept_units

UNMASKED = "spp_unmasked"


def unmasked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """sdpa without a mask: of whole prompts without padding, or of one new token per sequence.

    While a graph is captured, transformers makes a mask whether one is needed or not, and with a
    mask it copies every key and value for each query head. For an unknown attention implementation
    it makes none.
    """
    assert query.shape[2] in (1, key.shape[2]), "a prompt in parts needs a mask"
    attended: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, None, **options
    )
    return attended


AttentionInterface.register(UNMASKED, unmasked_attention)


def random_model(
    of: Published,
    config: Mapping[str, Any],
    layers: Iterable[LayerShape],
    device: str,
    dtype: torch.dtype,
    seed: int = 0,
) -> PreTrainedModel:
    """A model of a parsed config.json, dense or slim, whose layers have these shapes."""
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {
        spec.name: _random(spec, device, dtype, generator)
        for spec in of.family.tensors(of.shape, tuple(layers))
    }
    return _with_weights(config, tensors, device, dtype)


def random_dense(of: Published, device: str, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """The dense model of a shape."""
    return random_model(of, of.config, of.shape.layers, device, dtype, seed)


def slim_of(
    dense: PreTrainedModel, of: Published, plan: Plan, config: Mapping[str, Any]
) -> PreTrainedModel:
    """The slim model of a plan, its weights cut from a dense model's."""
    whole = dict(dense.named_parameters(remove_duplicate=False))
    tensors = {}
    for spec in of.family.tensors(of.shape, of.shape.layers):
        tensor = whole[spec.name].detach()
        units = None if spec.layer is None else kept_units(spec, plan.layers[spec.layer])
        if units is not None:
            assert spec.axis is not None
            kept = torch.from_numpy(kept_indices(units, spec.step)).to(tensor.device)
            tensor = tensor.index_select(spec.axis, kept)
        tensors[spec.name] = tensor
    return _with_weights(config, tensors, str(dense.device), dense.dtype)


def _random(
    spec: TensorSpec, device: str, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """Values that keep activations near one: multiplying zeros would be faster than real
    values."""
    tensor = torch.empty(spec.shape, dtype=dtype, device=device)
    if len(spec.shape) > 1:
        return tensor.normal_(0, 1 / math.sqrt(spec.shape[-1]), generator=generator)
    mean = 0.0 if spec.name.endswith(".bias") else 1.0
    return tensor.normal_(mean, 0.1, generator=generator)


def _with_weights(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], device: str, dtype: torch.dtype
) -> PreTrainedModel:
    """A model of a parsed config.json that holds these very tensors."""
    entries = {key: value for key, value in config.items() if key not in ("model_type", "auto_map")}
    settings = AutoConfig.for_model(config["model_type"], **entries)
    with torch.device("meta"), quiet_transformers():
        model: Any = AutoModelForCausalLM.from_config(
            settings, dtype=dtype, attn_implementation=UNMASKED
        )
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    # Its frequencies are a buffer, not a tensor of the checkpoint.
    rotary = model.base_model.rotary_emb
    with torch.device(device):
        model.base_model.rotary_emb = type(rotary)(config=rotary.config)
    unset = [name for name, held in _held(model) if held.is_meta]
    assert not unset, f"no values for {unset}"
    model.eval().requires_grad_(False)
    assert isinstance(model, PreTrainedModel)
    return model


def _held(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()

"""Plans and projections to try the oracle with, and what a model must look like afterwards."""

from __future__ import annotations

import torch

from spp_export.models.families import Role
from spp_export.planning import Plan
from spp_export.slicing.projections import Projection

IDS = torch.arange(3, 40)[None]


def plan_of(layers):
    return Plan("f" * 64, "dense", "per-layer", "none", tuple(layers))


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def state(model):
    """Everything a model is made of: which objects, and what they hold."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: (id(tensor), tensor.dtype, tensor.clone()) for name, tensor in tensors.items()}


def assert_untouched(model, before, *, same_objects=True):
    after = state(model)
    assert after.keys() == before.keys()
    for name, (identity, dtype, values) in before.items():
        assert after[name][1] == dtype, name
        assert torch.equal(after[name][2], values), name
        assert after[name][0] == identity or not same_objects, name
    assert hooks(model) == 0


def compensation(shape, layers, seed=0):
    """Any weights and bias for every layer's o_proj and, where it loses channels, down_proj."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for index, layer in enumerate(layers):
        widths = {Role.OUTPUT: len(layer.query_heads) * shape.head_dim}
        if layer.channels is not None:
            widths[Role.DOWN] = len(layer.channels)
        for role, width in widths.items():
            weight = torch.randn(shape.hidden_size, width, generator=generator) / 8
            bias = torch.randn(shape.hidden_size, generator=generator)
            found[index, role] = Projection(weight, bias)
    return found

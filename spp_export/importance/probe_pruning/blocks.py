"""The two prunable blocks of a layer, attention and MLP, and how to run a probe ahead through each.

Only the projections are called on the probe; the model's own forward pass is never replaced.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spp_export.common.errors import ModelError
from spp_export.importance.probe_pruning.probe import Probe
from spp_export.models.families import Family, Feature
from spp_export.models.shape import ModelShape

# What a family may compute otherwise than Llama.
KNOWN = {Feature.NO_GATE, Feature.ACTIVATION, Feature.LAYER_NORM, Feature.POSITIONS}


@dataclass(frozen=True)
class ProbedBlock(ABC):
    """One block: `norm` reads the residual stream, `body` what it gives, `consumer` writes back.

    `consumer` is o_proj or down_proj; its input holds `units` units of `step` columns each.
    """

    layer: int
    norm: nn.Module
    body: nn.Module
    consumer: nn.Linear
    units: int
    step: int

    @abstractmethod
    def ahead(self, x: Tensor, probe: Probe, call: Mapping[str, Any]) -> Tensor:
        """Inputs [kb,ks,C] of the consumer when only the probe of x [B,S,d] is run.

        `call` holds the keyword arguments of the body, as the model passes them.
        """

    @abstractmethod
    def run(self, x: Tensor, call: Mapping[str, Any]) -> Tensor:
        """What the whole block adds to the residual stream, [B,S,d]."""

    def columns(self, kept: Tensor) -> Tensor:
        """Mask of the consumer's input columns [C] from one of units [H] or [I]."""
        return kept.repeat_interleave(self.step)


@dataclass(frozen=True)
class AttentionBlock(ProbedBlock):
    """q, k, v and o with everything between."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    norms: tuple[nn.Module, nn.Module] | None

    def ahead(self, x: Tensor, probe: Probe, call: Mapping[str, Any]) -> Tensor:
        """Causal attention among the probe's tokens only, each at its original position."""
        kept = probe.take(x)

        def heads(module: nn.Module) -> Tensor:
            split: Tensor = module(kept).unflatten(-1, (-1, self.step))
            return split

        query, key, value = heads(self.query), heads(self.key), heads(self.value)
        if self.norms is not None:
            query, key = self.norms[0](query), self.norms[1](key)
        if tables := call.get("position_embeddings"):
            cos, sin = (_rotary(part, probe, x) for part in tables)
            query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        shared = self.units // key.shape[1]
        attended = F.scaled_dot_product_attention(
            query,
            key.repeat_interleave(shared, dim=1),
            value.repeat_interleave(shared, dim=1),
            attn_mask=self._visible(probe.positions),
        )
        return attended.transpose(1, 2).flatten(2)

    def run(self, x: Tensor, call: Mapping[str, Any]) -> Tensor:
        """The model's own attention."""
        written: Tensor = self.body(hidden_states=x, **call)[0]
        return written

    def _visible(self, positions: Tensor) -> Tensor:
        """Which keys [ks,ks] each probed token may see: earlier ones, hence no pads on the right.

        A sliding window counts original positions, as it does in the model.
        """
        distance = positions[:, None] - positions[None]
        causal = distance >= 0
        config = getattr(self.body, "config", None)
        window = getattr(self.body, "sliding_window", getattr(config, "sliding_window", None))
        if window is not None:
            causal &= distance < window
        return causal


@dataclass(frozen=True)
class MlpBlock(ProbedBlock):
    """The projections and the activation between them, whatever these are."""

    def ahead(self, x: Tensor, probe: Probe, call: Mapping[str, Any]) -> Tensor:
        """What down_proj reads, token by token: what the MLP gives without it."""
        (name,) = (name for name, part in self.body.named_children() if part is self.consumer)
        setattr(self.body, name, nn.Identity())
        try:
            read: Tensor = self.body(probe.take(x))
        finally:
            setattr(self.body, name, self.consumer)
        return read

    def run(self, x: Tensor, call: Mapping[str, Any]) -> Tensor:
        """The model's own MLP."""
        written: Tensor = self.body(x)
        return written


def check_family(family: Family) -> None:
    """ModelError for a family that computes what is not known here."""
    family.refuse(set(Feature) - KNOWN, "Probe Pruning", "Use another criterion.")


def layer_blocks(
    model: nn.Module, family: Family, shape: ModelShape
) -> list[tuple[ProbedBlock, ProbedBlock]]:
    """Attention and MLP of every layer of the dense model, in order.

    Raises ModelError where weights are offloaded: scores read them between forward passes; and as
    `check_family` does.
    """
    check_family(family)
    pairs: list[tuple[ProbedBlock, ProbedBlock]] = []
    for layer in range(shape.num_layers):

        def part(role: str, layer: int = layer) -> nn.Module:
            return model.get_submodule(family.layer_name(layer, role))

        attention = AttentionBlock(
            layer,
            norm=part(family.attention_norm),
            body=part(family.attention),
            consumer=_linear(part(family.output), family.layer_name(layer, family.output)),
            units=shape.query_heads,
            step=shape.head_dim,
            query=part(family.query),
            key=part(family.key),
            value=part(family.value),
            norms=(part(family.query_norm), part(family.key_norm)) if shape.qk_norm else None,
        )
        mlp = MlpBlock(
            layer,
            norm=part(family.mlp_norm),
            body=_mlp(family, part),
            consumer=_linear(part(family.down), family.layer_name(layer, family.down)),
            units=shape.channels,
            step=1,
        )
        pairs.append((attention, mlp))
    return pairs


def _mlp(family: Family, part: Callable[[str], nn.Module]) -> nn.Module:
    """The module of the MLP, or one of its parts where a layer, as OPT's, has these alone."""
    if module := family.down.rpartition(".")[0]:
        return part(module)
    return nn.Sequential(part(family.up), part("activation_fn"), part(family.down))


def zero_removed(values: Tensor, kept: Tensor) -> Tensor:
    """`values` [...,C] with the columns outside `kept` [C] zero, whatever they held."""
    # filling, not multiplication: a removed unit's infinity must not become NaN
    return values.masked_fill(~kept.to(values.device), 0)


@contextmanager
def masked(block: ProbedBlock, kept: Tensor) -> Iterator[None]:
    """The consumer reads zeros from all but the kept units [H] or [I]; undone on exit."""
    columns = block.columns(kept)
    handle = block.consumer.register_forward_pre_hook(
        lambda _module, args: (zero_removed(args[0], columns), *args[1:])
    )
    try:
        yield
    finally:
        handle.remove()


def _linear(module: nn.Module, name: str) -> nn.Linear:
    assert isinstance(module, nn.Linear), name
    if module.weight.is_meta:
        raise ModelError(
            f"{name}: the weights are offloaded, and probe pruning reads them all the time. "
            "Load the model whole, on one device or several."
        )
    return module


def _rotary(part: Tensor, probe: Probe, x: Tensor) -> Tensor:
    """cos or sin [kb,ks,1,dh] of the probe from [1 or B,S,dh] of the batch."""
    return probe.take(part.to(x.device).expand(x.shape[0], -1, -1))[:, :, None]


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of heads [kb,ks,n,dh], the halves of dh paired."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin

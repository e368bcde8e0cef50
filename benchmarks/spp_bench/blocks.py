"""Attention and MLP blocks of chosen sizes, with random weights, ready to be timed.

They are layers of the classes that run slim checkpoints, in one model whose every layer has sizes
of its own. There are so many copies of each that the processor's cache cannot hold them all
between two passes, just as it cannot hold the layers of a real model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import spp_export.models.modeling  # noqa: F401  registers the per-layer classes
from spp_bench.graphs import cuda_graph, on_device
from spp_export.common.progress import quiet_transformers
from spp_export.models.families import Family, Feature
from spp_export.models.shape import LayerShape, ModelShape
from spp_export.planning.latency import Phase
from spp_export.slicing.config import slim_config

# More than the caches of a processor or a card hold.
_COLD_BYTES = 1 << 28
_MOST_COPIES = 16
# These describe attention windows, which `profile` has found to be wider than the context.
_WINDOWS = {"sliding_window": None, "use_sliding_window": False, "layer_types": None}


@dataclass(frozen=True)
class Setting:
    """What a block is timed on: one token per sequence after `context` cached ones, or a prompt of
    `context` tokens."""

    phase: Phase
    batch: int
    context: int
    device: str
    dtype: str

    @property
    def new_tokens(self) -> int:
        """Tokens per sequence that go through a block."""
        return 1 if self.phase == "decode" else self.context

    @property
    def captured(self) -> bool:
        """Whether a pass is a CUDA graph, so that it does not wait for Python."""
        return self.device.startswith("cuda")


class _Cache:
    """Keys and values of the tokens before; every call is the step that follows them.

    In place: the last position of a buffer is written, as in a static cache. Otherwise everything
    is copied to a longer buffer, as in the growing cache of transformers.
    """

    def __init__(self, keys: Tensor, values: Tensor, in_place: bool) -> None:
        self.keys, self.values, self.in_place = keys, values, in_place

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """All keys and values [B,G,T+S,D], the new ones [B,G,S,D] last."""
        if not self.in_place:
            return torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        self.keys[:, :, -1:] = keys
        self.values[:, :, -1:] = values
        return self.keys, self.values


# A block: ("attention", query heads, KV heads) or ("mlp", channels); or ("rest",) of a step.
PassKind = tuple[str | int, ...]


@dataclass(frozen=True)
class Pass:
    """Something to be timed: `count` blocks of a kind, one after another."""

    kind: PassKind
    run: Callable[[], Any]
    count: int


def copies_of(shape: ModelShape, layers: Sequence[LayerShape], element_bytes: int) -> int:
    """How many copies of these layers are too many for any processor cache."""
    parameters = shape.head_parameters(layers)
    parameters += sum(layer.channels for layer in layers) * shape.channel_parameters
    return min(_MOST_COPIES, max(1, math.ceil(_COLD_BYTES / (parameters * element_bytes))))


def make_passes(
    config: Mapping[str, Any],
    family: Family,
    shape: ModelShape,
    attention: Sequence[tuple[int, int]],
    widths: Sequence[int],
    setting: Setting,
) -> list[Pass]:
    """Passes over attention blocks with these numbers of query and KV heads, over MLP blocks of
    these widths, and over the rest of a step. config: the model's config.json.

    On the CPU a pass is one block, short enough that other work seldom interrupts it; on a card it
    is a CUDA graph of all copies.
    """
    dtype: torch.dtype = getattr(torch, setting.dtype)
    kinds = max(len(attention), len(widths))
    sizes = [
        LayerShape(*attention[i % len(attention)], widths[i % len(widths)]) for i in range(kinds)
    ]
    copies = copies_of(shape, sizes, dtype.itemsize)
    model = _model(config, family, shape, sizes * copies, setting, dtype)
    parts = _Parts(model, family, shape, setting, dtype)
    layers = [list(model.model.layers[i::kinds]) for i in range(kinds)]
    works: dict[PassKind, list[Callable[[], None]]] = {}
    for own, (query, groups) in zip(layers, attention, strict=False):
        works["attention", query, groups] = [parts.attention(layer, groups) for layer in own]
    for own, width in zip(layers, widths, strict=False):
        works["mlp", width] = [parts.mlp(layer) for layer in own]
    works["rest",] = [parts.rest]
    return [entry for kind, work in works.items() for entry in _passes(kind, work, setting)]


# What makes more of a block than a norm and what reads it, or takes other angles for some layers.
_UNKNOWN = (Feature.PARALLEL, Feature.SANDWICH, Feature.ROTARY)


class _Parts:
    """Parts of a model, and what flows into them: a stream [B,S,C] at its positions."""

    def __init__(
        self, model: Any, family: Family, shape: ModelShape, setting: Setting, dtype: torch.dtype
    ) -> None:
        family.refuse(_UNKNOWN, "measuring block by block", "Plan by --keep or --max-kv-bytes.")
        self.model, self.family, self.shape = model, family, shape
        self.setting, self.dtype = setting, dtype
        count = setting.new_tokens
        self.stream = self._random(setting.batch, count, shape.hidden_size)
        first = setting.context if setting.phase == "decode" else 0
        self.positions = torch.arange(first, first + count, device=setting.device)[None]
        self.tokens = torch.zeros((setting.batch, count), dtype=torch.int64, device=setting.device)
        with torch.inference_mode():
            self.rotary = model.model.rotary_emb(self.stream, self.positions)

    def attention(self, layer: Any, kv_heads: int) -> Callable[[], None]:
        """The attention block of a layer, with a cache of its own."""
        cache = self._cache(kv_heads)

        def once() -> None:
            mixed, _ = layer.get_submodule(self.family.attention)(
                hidden_states=layer.get_submodule(self.family.attention_norm)(self.stream),
                position_embeddings=self.rotary,
                attention_mask=None,
                past_key_values=cache,
            )
            torch.add(self.stream, mixed)

        return once

    def mlp(self, layer: Any) -> Callable[[], None]:
        """The MLP block of a layer."""

        def once() -> None:
            normed = layer.get_submodule(self.family.mlp_norm)(self.stream)
            torch.add(self.stream, layer.mlp(normed))

        return once

    def rest(self) -> None:
        """What a step does outside its layers."""
        embedded = self.model.model.embed_tokens(self.tokens)
        self.model.model.rotary_emb(embedded, self.positions)
        self.model.lm_head(self.model.model.norm(embedded)[:, -1:])

    def _cache(self, kv_heads: int) -> _Cache | None:
        setting = self.setting
        if setting.phase == "prefill":
            return None
        length = setting.context + int(setting.captured)
        size = (setting.batch, kv_heads, length, self.shape.head_dim)
        return _Cache(self._random(*size), self._random(*size), in_place=setting.captured)

    def _random(self, *size: int) -> Tensor:
        return torch.randn(size, device=self.setting.device).to(self.dtype)


def _model(
    config: Mapping[str, Any],
    family: Family,
    shape: ModelShape,
    layers: Sequence[LayerShape],
    setting: Setting,
    dtype: torch.dtype,
) -> Any:
    """A causal LM of these layers on the device, with random weights."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    stock = {name: value for name, value in config.items() if name not in _WINDOWS}
    stock |= {"num_hidden_layers": len(layers), "pad_token_id": None}
    stock |= {name: _WINDOWS[name] for name in _WINDOWS if name in config and name != "layer_types"}
    many = replace(shape, num_layers=len(layers))
    written = slim_config(stock, family, many, layers, "per-layer")
    made = CONFIG_MAPPING[written["model_type"]].from_dict(written)
    with quiet_transformers(), torch.device(setting.device):
        model = AutoModelForCausalLM.from_config(made, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def _passes(kind: PassKind, works: Sequence[Callable[[], None]], setting: Setting) -> list[Pass]:
    """One pass for each piece of work, or a captured one over all of them."""

    def run(call: Callable[[], None]) -> None:
        with torch.inference_mode():
            call()

    def once() -> None:
        for work in works:
            work()

    if not setting.captured:
        run(once)
        return [Pass(kind, partial(run, work), 1) for work in works]
    with torch.inference_mode(), on_device(setting.device):
        return [Pass(kind, cuda_graph(once), len(works))]

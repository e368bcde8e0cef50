"""Decoders larger than memory: their weights stay on disk, and are there one layer at a time.

The model is transformers' own, so hooks, masks and caches work as on any other; only its weights
come when a layer is entered and go when the next one is, which meanwhile is read ahead. Several
inputs go through it together, layer by layer, so that the weights are read once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from spp_export.common.progress import progress
from spp_export.models.checkpoint.checkpoint import open_checkpoint
from spp_export.models.checkpoint.header import StoredTensor
from spp_export.models.families import Family, Feature
from spp_export.models.weights_on_disk import (
    TableOnDisk,
    WeightBlock,
    empty_model,
    stored_as_tensor,
    stored_weights,
)

_STREAM = "spp_layer_stream"
# What happens between the last layer and the logits, in the embedding or beside the layers; and
# experts and towers of vision, whose tensors in memory are others than on disk.
_UNKNOWN = (
    Feature.MULTIPLIERS,
    Feature.SOFTCAP,
    Feature.POSITIONS,
    Feature.ALIBI,
    Feature.SIDE_BY_SIDE,
    Feature.EXPERTS,
    Feature.MIXERS,
    Feature.VISION,
)
# Arguments of one call of the model: input_ids and what else it takes.
Call = Mapping[str, Any]


def open_layerwise(
    path: str | Path,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """A dense or slim checkpoint as a transformers model that runs from disk, in evaluation mode.

    In memory are at most two layers in `dtype`, or the head, and what is computed with them;
    `model.to(dtype)` makes it compute in a wider one. Errors as of `open_checkpoint`.
    """
    directory = Path(path)
    opened = open_checkpoint(directory)
    opened.family.refuse(_UNKNOWN, "a model that runs from disk", "Leave out --layerwise.")
    model = empty_model(directory, dtype)
    weights = stored_weights(directory, model, opened)
    stream = LayerStream(model, opened.family, weights, torch.device(device))
    object.__setattr__(model, _STREAM, stream)  # not a submodule
    return model


def stream_of(model: nn.Module) -> LayerStream | None:
    """What feeds a model of `open_layerwise`; None for any other model."""
    stream: LayerStream | None = getattr(model, _STREAM, None)
    return stream


# As a decorator: a `with` would go on while the generator waits, in whoever asks it next.
@torch.no_grad()
def logits_of_calls(model: nn.Module, calls: Sequence[Call]) -> Iterator[Tensor]:
    """Logits [B,S,V] of each call, in order, each made when it is asked for.

    Calls that share a cache, in `past_key_values`, are steps of one decoding.
    """
    stream = stream_of(model)
    if stream is None:
        for call in calls:
            yield model(**call).logits
        return
    with progress("layer by layer", 1.0) as advance_to:
        states = stream.hidden_states(calls, advance=advance_to)
    try:
        while states:
            yield stream.head(states.pop(0))
    finally:
        stream.forget()


class LayerStream:
    """The weights of a model as they are read from disk.

    progress: shown while `logits_of_calls` reads the layers
    """

    def __init__(
        self,
        model: Any,
        family: Family,
        weights: Mapping[str, StoredTensor],
        device: torch.device,
    ) -> None:
        self.decoder: Any = model.get_submodule(family.layers.rpartition(".")[0])
        self.head: nn.Module = model.get_submodule(family.head)
        self._norm: nn.Module = model.get_submodule(family.final_norm)
        self._config = model.config
        self._own_dtype = model.dtype
        self._device = device
        self._layers: Any = model.get_submodule(family.layers)
        self._edits: list[Callable[[int], None]] = []
        self._now: int | None = None
        self._ahead: tuple[int, Future[list[Tensor]]] | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="spp-layers")
        self._blocks = [
            WeightBlock(model, family.layer_name(index, "")[:-1], weights)
            for index in range(len(self._layers))
        ]
        self._blocks.append(WeightBlock(model, family.head, weights))
        table = TableOnDisk(weights[f"{family.embedding}.weight"], model.dtype, device)
        model.set_input_embeddings(table)
        self._resident = table.weight
        norm = WeightBlock(model, family.final_norm, weights)
        norm.fill(self._read(norm))
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)
        self._hook(model)

    def hidden_states(
        self,
        calls: Sequence[Call],
        *,
        turn: Callable[[int], None] = lambda call: None,
        layer_done: Callable[[int], None] = lambda layer: None,
        advance: Callable[[float], None] = lambda share: None,
    ) -> list[Tensor]:
        """What the head reads [B,S,d], for each call; every layer takes all calls in turn, so that
        the streams of all of them are in memory.

        `turn` is told the call that is computed next, `layer_done` the layer that all have been
        through, and `advance` the share of the work that is done.
        """
        with torch.no_grad():
            runs = self._prepare(calls)
            total = len(self._layers) * max(len(runs), 1)
            for index, layer in enumerate(self._layers):
                for number, run in enumerate(runs):
                    turn(number)
                    run.hidden = layer(run.hidden, **run.arguments[index])
                    advance((index * len(runs) + number + 1) / total)
                layer_done(index)
            self.forget()
            return [self._norm(run.hidden) for run in runs]

    @contextmanager
    def editing(self, edit: Callable[[int], None]) -> Iterator[None]:
        """Call `edit(layer)` whenever a layer's weights have come; they go as they are."""
        self.forget()
        self._edits.append(edit)
        try:
            yield
        finally:
            self._edits.remove(edit)
            self.forget()

    def forget(self) -> None:
        """Free all weights in memory but those of the final norm."""
        self._ahead = None
        self._leave()

    def _hook(self, model: nn.Module) -> None:
        for index, module in enumerate([*self._layers, self.head]):
            module.register_forward_pre_hook(lambda *_, index=index: self._enter(index))
        for module in (self.decoder, model):
            module.register_forward_hook(lambda *_: self.forget())

    def _enter(self, index: int) -> None:
        if index == self._now:
            return
        self._leave()
        ahead, self._ahead = self._ahead, None
        block = self._blocks[index]
        block.fill(ahead[1].result() if ahead and ahead[0] == index else self._read(block))
        self._now = index
        if index == len(self._layers):
            return
        for edit in self._edits:
            edit(index)
        if index + 1 < len(self._layers):
            following = self._blocks[index + 1]
            self._ahead = (index + 1, self._reader.submit(self._read, following))

    def _leave(self) -> None:
        if self._now is not None:
            self._blocks[self._now].empty()
            self._now = None

    def _read(self, block: WeightBlock) -> list[Tensor]:
        dtype = self._resident.dtype
        return [
            stored_as_tensor(tensor, self._own_dtype, dtype, self._device)
            for tensor in block.stored
        ]

    def _prepare(self, calls: Sequence[Call]) -> list[_Run]:
        """What the decoder gives its layers in each call, found by a decoder of layers that only
        look on. Stand-ins for caches grow as the real ones will."""
        stand_ins: dict[int, DynamicCache] = {}
        runs = []
        for call in calls:
            run, cache = _Run(), call.get("past_key_values")
            if cache is not None:
                stand_in = stand_ins.setdefault(id(cache), DynamicCache(config=self._config))
                call = {**call, "past_key_values": stand_in}
            self.decoder.layers = nn.ModuleList(
                _Onlooker(layer, index, run, cache) for index, layer in enumerate(self._layers)
            )
            try:
                self.decoder(**call)
            finally:
                self.decoder.layers = self._layers
            runs.append(run)
        return runs


@dataclass
class _Run:
    """One call in progress: the stream [B,S,d], and what each layer takes beside it."""

    hidden: Any = None
    arguments: list[dict[str, Any]] = field(default_factory=list)


class _Onlooker(nn.Module):
    """Stands in for a layer: records its arguments and passes the stream on."""

    def __init__(self, layer: nn.Module, index: int, run: _Run, cache: Any) -> None:
        super().__init__()
        # transformers 4 asks the layer which of the masks it takes
        self.attention_type = getattr(layer, "attention_type", None)
        self._index, self._run, self._cache = index, run, cache

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        """The stream as it came."""
        if self._index == 0:
            self._run.hidden = hidden
        if self._cache is not None:
            width = hidden.new_zeros((1, 1, hidden.shape[1], 1))
            arguments["past_key_values"].update(width, width, self._index)
            arguments["past_key_values"] = self._cache
        self._run.arguments.append(arguments)
        return hidden

"""A transformers model with a cache of fixed size, whose decoding can be captured as one graph.

Buffers for every token of a cell are there from the start, as wide in each layer as that layer's
KV heads; a step writes its keys and values into them and attends to those that have been written.
All steps of a cell are one graph, of the same kernels that eager steps launch, so that nothing
waits for Python. transformers' own StaticCache needs a mask, since all its steps have one shape;
with a mask every key and value is copied for each query head, which hides what KV heads cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from spp_bench.bounds import Sizes
from spp_bench.candidates import Candidate
from spp_bench.cases import Ids
from spp_bench.clocks import clock_for
from spp_bench.engines.runner import Logits
from spp_bench.graphs import cuda_graph, on_device
from spp_bench.shapes.random_models import random_model
from spp_bench.shapes.shapes import published

# Without cuDNN's attention, which makes a new plan for every length of the cache.
_DECODING = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

# From some work, which returns logits, to a call that repeats it on the same memory.
Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


class Room:
    """Memory of one device and dtype that the caches of several models use in turn.

    It begins as random numbers: for timing, a cache that no prompt was read into is as good as
    any.
    """

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device = device
        self._memory = torch.empty(0, dtype=dtype, device=device)

    def free(self) -> None:
        """Give the memory up. It is freed once nothing that was taken from it is in use."""
        self._memory = self._memory.new_empty(0)

    def reserve(self, count: int) -> None:
        """Make room for `count` elements; what was taken before stays where it is."""
        if count > self._memory.numel():
            self.free()
            self._memory = self._memory.new_empty(count).normal_()

    def take(self, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Tensors of these shapes, one after another; tensors taken by another call share their
        memory."""
        sizes = [int(np.prod(shape)) for shape in shapes]
        self.reserve(sum(sizes))
        parts = self._memory[: sum(sizes)].split(sizes)
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


class FixedLayer(CacheLayerMixin):
    """Keys and values [B,KV,T,D] of a layer, of which `length` tokens are written."""

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = keys, values
        self.length = 0
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the buffers are there."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_options: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [B,KV,S,D] after what is there; return everything written so far."""
        end = self.length + key_states.shape[2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what is attended to."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens that are written."""
        return self.length

    def get_max_length(self) -> int:
        """Tokens that there is room for."""
        return self.keys.shape[2]

    def get_max_cache_shape(self) -> int:
        """The same, as transformers before 5.14 calls it."""
        return self.get_max_length()


class StaticRunner:
    """A model whose cache is taken from a `Room`; with `capture` None every kernel is launched
    from Python.

    Its prompts have no padding. Attention must be `UNMASKED`, or another that takes no mask.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        sizes: Sizes,
        room: Room,
        capture: Capture | None = None,
    ) -> None:
        assert set(sizes.windows) == {None}, "no sliding windows here"
        self.name = name
        self.model = model
        self.clock = clock_for(str(model.device))
        self._sizes = sizes
        self._room = room
        self._capture = capture
        self._capacity = 0
        self._layers: list[FixedLayer] = []
        self._logits: Tensor | None = None
        # By batch size and capacity, so that a graph can be used again: it knows its cache's place.
        self._caches: dict[tuple[int, int], list[FixedLayer]] = {}
        self._captured: dict[tuple[int, ...], tuple[Tensor, Callable[[], Tensor]]] = {}

    @classmethod
    def load(cls, candidate: Candidate, device: str) -> StaticRunner:
        """Make the model of a candidate that was made from a shape."""
        assert candidate.made is not None
        made, dtype = candidate.made, getattr(torch, candidate.precision)
        model = random_model(
            published(made.shape), made.config, candidate.sizes.layers, device, dtype, made.seed
        )
        capture = cuda_graph if candidate.engine == "graph" else None
        return cls(candidate.name, model, candidate.sizes, Room(device, dtype), capture)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters; tied ones count once."""
        held = {parameter.data_ptr(): parameter.nbytes for parameter in self.model.parameters()}
        return sum(held.values())

    def reserve(self, length: int) -> None:
        """Have room, from the next prefill on, for `length` tokens per sequence."""
        self._capacity = length

    def prefill(self, ids: Ids) -> Any:
        """Begin anew with prompts [B,S]."""
        self._begin(len(ids))
        with torch.inference_mode():
            self._logits = self._forward(self._on_device(ids))
        return self._logits

    def fill(self, batch: int, length: int) -> None:
        """As if prompts of `length` tokens had been read; the cache is whatever was there."""
        self._begin(batch)
        self._move(length)

    def decode(self, ids: Ids) -> Any:
        """One step for each column of [B,N], tokens that are given and not chosen."""
        with torch.inference_mode(), on_device(self.model.device), sdpa_kernel(_DECODING):
            if self._capture is None:
                self._logits = self._steps(self._on_device(ids))
                return
            start = self._layers[0].length
            key = (self._capacity, start, *ids.shape)
            if key not in self._captured:
                self._captured[key] = self._captured_steps(ids, start, self._capture)
            fed, replay = self._captured[key]
            fed.copy_(torch.from_numpy(ids))
            self._logits = replay()
            self._move(start + ids.shape[1])

    def logits(self) -> Logits:
        """Logits [B,V] at the last token fed."""
        assert self._logits is not None
        values: Logits = self._logits[:, -1].float().cpu().numpy()
        return values

    def kv_bytes(self) -> int:
        """Bytes of the cache's buffers."""
        return sum(tensor.nbytes for tensor in self._buffers())

    def forget(self) -> None:
        """Free the caches, the graphs that write to them, and the room."""
        self.close()
        self._room.free()

    def close(self) -> None:
        """Free everything but the room, which others may use."""
        self._captured.clear()
        self._caches.clear()
        self._layers = []
        self._logits = None

    def _begin(self, batch: int) -> None:
        """An empty cache of the capacity that is reserved."""
        key = (batch, self._capacity)
        if key not in self._caches:
            width = self._sizes.shape.head_dim
            heads = [layer.kv_heads for layer in self._sizes.layers for _ in range(2)]
            taken = self._room.take([(batch, count, self._capacity, width) for count in heads])
            pairs = zip(taken[::2], taken[1::2], strict=True)
            self._caches[key] = [FixedLayer(keys, values) for keys, values in pairs]
        self._layers = self._caches[key]
        self._move(0)

    def _buffers(self) -> Iterable[Tensor]:
        for layer in self._layers:
            yield from (layer.keys, layer.values)

    def _move(self, length: int) -> None:
        for layer in self._layers:
            layer.length = length

    def _on_device(self, ids: Ids) -> Tensor:
        return torch.from_numpy(ids).to(self.model.device)

    def _captured_steps(
        self, ids: Ids, start: int, capture: Capture
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        """The tensor [B,N] that tokens are fed through, and the call that decodes them from
        `start` on."""
        fed = self._on_device(ids)

        def work() -> Tensor:
            self._move(start)
            return self._steps(fed)

        return fed, capture(work)

    def _steps(self, fed: Tensor) -> Tensor:
        for column in fed.T:
            logits = self._forward(column[:, None])
        return logits

    def _forward(self, ids: Tensor) -> Tensor:
        output: Any = self.model(
            input_ids=ids,
            past_key_values=Cache(layers=list(self._layers)),
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits
        return logits

"""Forward passes over texts on the frozen dense model, observed where the method looks.

Observers see one layer's activations at a time and keep only what they reduce them to. Padding
never reaches them: they get the real tokens of a batch, in order, and which text each came from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from spp_export.families import Family
from spp_export.progress import Progress, no_progress

MAX_TOKENS = 512
_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class TokenBatch:
    """Right-padded token ids [B,S], their mask [B,S] and the index of each row's text."""

    input_ids: Tensor
    attention_mask: Tensor
    texts: tuple[int, ...]

    @property
    def real_tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.attention_mask.sum())


class Observer(Protocol):
    """Something that reduces the activations of one place in every layer.

    `place` is "residual" (the stream after attention, before the MLP's norm, [T,d]),
    "attention" (what the attention block adds to the stream, [T,d]) or "output" (the input of
    o_proj, [T,H*dh]). `text_T` gives the index of the text of each of the T real tokens.
    """

    place: str

    def see(self, layer: int, values: Tensor, text_T: Tensor) -> None:
        """Take one batch of one layer."""


def token_batches(
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_tokens: int = MAX_TOKENS,
    batch_tokens: int = _BATCH_TOKENS,
) -> list[TokenBatch]:
    """Tokenise, truncate to `max_tokens`, and batch texts of similar length together.

    A batch holds at most `batch_tokens` tokens, padding included, and at least one text.

    Texts that tokenise to nothing are left out. The order is a function of the texts alone.
    """
    encoded = [
        tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"] for text in texts
    ]
    order = sorted((i for i, ids in enumerate(encoded) if ids), key=lambda i: (len(encoded[i]), i))
    batches: list[TokenBatch] = []
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * len(encoded[order[stop]]) <= batch_tokens:
            stop += 1
        batches.append(_pad([(i, encoded[i]) for i in order[start:stop]]))
        start = stop
    return batches


def _pad(rows: Sequence[tuple[int, list[int]]]) -> TokenBatch:
    width = max(len(ids) for _, ids in rows)
    input_ids = torch.zeros((len(rows), width), dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for row, (_, ids) in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = 1
    return TokenBatch(input_ids, mask, tuple(index for index, _ in rows))


def observe(
    model: nn.Module,
    family: Family,
    batches: Sequence[TokenBatch],
    observers: Sequence[Observer],
    *,
    progress: Progress = no_progress,
    description: str = "reading activations",
) -> None:
    """Run the decoder over the batches once and show every observer what it asked for."""
    decoder = model.get_submodule(family.layers.rpartition(".")[0])
    device = input_device(model)
    state = _Current()
    done = 0
    with (
        torch.no_grad(),
        _hooks(model, family, observers, state),
        progress(description, sum(b.real_tokens for b in batches)) as advance_to,
    ):
        for batch in batches:
            state.keep = batch.attention_mask.bool()
            rows = torch.tensor(batch.texts)
            state.texts = rows[:, None].expand_as(state.keep)[state.keep]
            decoder(
                input_ids=batch.input_ids.to(device),
                attention_mask=batch.attention_mask.to(device),
                use_cache=False,
            )
            done += batch.real_tokens
            advance_to(done)


def input_device(model: nn.Module) -> torch.device:
    """Where token ids go: accelerate moves them on where it has spread or offloaded the weights."""
    device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


class _Current:
    """The batch now running, for hooks that see only a tensor."""

    keep: Tensor
    texts: Tensor


@contextmanager
def _hooks(
    model: nn.Module, family: Family, observers: Sequence[Observer], state: _Current
) -> Iterator[None]:
    handles = []

    def show(place: str, layer: int, values: Tensor) -> None:
        keep = state.keep.to(values.device)
        real = values[keep]
        text_T = state.texts.to(values.device)
        for observer in observers:
            if observer.place == place:
                observer.see(layer, real, text_T)

    def before(place: str, layer: int) -> Any:
        return lambda _module, args: show(place, layer, args[0])

    def after(place: str, layer: int) -> Any:
        return lambda _module, _args, output: show(
            place, layer, output[0] if isinstance(output, tuple) else output
        )

    places = {observer.place for observer in observers}
    layers = model.get_submodule(family.layers)
    assert isinstance(layers, nn.ModuleList)
    try:
        for index, layer in enumerate(layers):
            assert isinstance(layer, nn.Module)
            if "residual" in places:
                norm = layer.get_submodule(family.mlp_norm)
                handles.append(norm.register_forward_pre_hook(before("residual", index)))
            if "output" in places:
                output = layer.get_submodule(family.output)
                handles.append(output.register_forward_pre_hook(before("output", index)))
            if "attention" in places:
                attention = layer.get_submodule(family.attention)
                handles.append(attention.register_forward_hook(after("attention", index)))
        yield
    finally:
        for handle in handles:
            handle.remove()


class TextMeans:
    """Mean over each text's real tokens of a [T,d] stream: `values` is [N,L,d] float32."""

    def __init__(self, place: str, texts: int, layers: int, width: int) -> None:
        self.place = place
        self._sums = torch.zeros((layers, texts, width), dtype=torch.float64)
        self._counts = torch.zeros(texts, dtype=torch.float64)

    def see(self, layer: int, values: Tensor, text_T: Tensor) -> None:
        """Add the tokens of one batch to their texts' sums."""
        self._sums[layer].index_add_(0, text_T.cpu(), values.double().cpu())
        if layer == 0:
            self._counts += torch.bincount(text_T.cpu(), minlength=len(self._counts)).double()

    @property
    def values(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """[N,L,d] means; a text without tokens has zeros."""
        means = self._sums / self._counts.clamp(min=1)[None, :, None]
        result: np.ndarray[Any, np.dtype[np.float32]] = means.transpose(0, 1).float().numpy()
        return result


class SecondMoments:
    """Second moments E[a a^T] [L,m,m] and means E[a] [L,m] of the inputs of o_proj, over tokens.

    Sums are kept in fp32 (DESIGN: accumulated in fp32), one matrix per layer.
    """

    place = "output"

    def __init__(self, layers: int, width: int) -> None:
        self.products = torch.zeros((layers, width, width), dtype=torch.float32)
        self.sums = torch.zeros((layers, width), dtype=torch.float32)
        self.tokens = 0

    def see(self, layer: int, values: Tensor, text_T: Tensor) -> None:
        """Add a^T a of one batch."""
        values = values.float()
        self.products[layer] += (values.T @ values).cpu()
        self.sums[layer] += values.sum(0).cpu()
        if layer == 0:
            self.tokens += values.shape[0]


class StreamSensitivity:
    """E 1/||r||^2 [L] over tokens, r the residual stream after attention.

    How much a change of given size in the stream counts where the next block normalises it. The
    inverse is taken per token: first tokens carry norms so large that a mean would see only them.
    """

    place = "residual"

    def __init__(self, layers: int) -> None:
        self.sums = torch.zeros(layers, dtype=torch.float64)
        self.tokens = 0

    def see(self, layer: int, values: Tensor, text_T: Tensor) -> None:
        """Add one batch of the stream [T,d]."""
        norms = values.double().square().sum(1).clamp(min=torch.finfo(torch.float32).tiny)
        self.sums[layer] += norms.reciprocal().sum().cpu()
        if layer == 0:
            self.tokens += values.shape[0]

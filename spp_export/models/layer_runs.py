"""A model in memory, run one layer after the other: calls wait between layers, so that a layer can
be changed before they go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from spp_export.common.errors import ModelError
from spp_export.models.families import Family

# What layers write within a call of the decoder and by themselves differs by rounding alone.
_MOST_APART = 1e-2
_STREAM = "hidden_states"


@dataclass
class LayerRun:
    """A call of a model on its way through the layers.

    stream  [B,S,d] that the next layer reads, in float32
    beside  what each layer takes beside it: by position, and by name
    """

    stream: Tensor = field(default_factory=lambda: torch.empty(0))
    beside: list[tuple[tuple[Any, ...], Mapping[str, Any]]] = field(default_factory=list)

    def written(self, layer: nn.Module, index: int) -> Tensor:
        """The stream [B,S,d], in float32, after a layer: the one with this number, or another in
        its place."""
        others, named = self.beside[index]
        return _first(layer(self.stream, *others, **named)).float()

    def record(self, _: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """What a layer is given: a hook before each of them."""
        if not self.beside:
            self.stream = (given[0] if given else named[_STREAM]).float()
        rest = {name: value for name, value in named.items() if name != _STREAM}
        self.beside.append((given[1:], rest))


@torch.no_grad()
def layer_runs(
    model: nn.Module,
    family: Family,
    calls: Sequence[Mapping[str, Any]],
    advance: Callable[[], None] = lambda: None,
) -> list[LayerRun]:
    """The calls as they are before the first layer, by a pass through the layers for each, after
    which `advance` is called.

    Raises ModelError where layers that are run one by one do not give what the model does.
    """
    decoder = model.get_submodule(family.layers.rpartition(".")[0])
    layers: Any = model.get_submodule(family.layers)
    runs: list[LayerRun] = []
    written: list[Tensor] = []
    for call in calls:
        run = LayerRun()
        handles = [
            layer.register_forward_pre_hook(run.record, with_kwargs=True) for layer in layers
        ]
        if not runs:
            last: Any = layers[-1]
            handles.append(
                last.register_forward_hook(lambda *given: written.append(_first(given[-1])))
            )
        try:
            decoder(**call)
        finally:
            for handle in handles:
                handle.remove()
        if not runs:
            _check_alone(layers, run, written[0].float(), family)
        runs.append(run)
        advance()
    return runs


def _check_alone(layers: Any, run: LayerRun, expected: Tensor, family: Family) -> None:
    alone = replace(run)
    for index, layer in enumerate(layers):
        alone.stream = alone.written(layer, index)
    apart = float((alone.stream - expected).norm() / expected.norm())
    if not apart <= _MOST_APART:
        raise ModelError(
            f"the layers of {family.model_type} models do not run one by one: what the last of "
            f"them writes is {apart:.2g} off. Use --layer-rounds 0."
        )


def _first(output: Any) -> Tensor:
    """Layers give the stream, or a tuple that begins with it."""
    stream: Tensor = output[0] if isinstance(output, tuple) else output
    return stream

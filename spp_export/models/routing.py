"""Where experts and routers are in a model in memory, whose names versions of transformers change,
and how to keep a router from choosing some experts."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from spp_export.common.errors import ModelError
from spp_export.models.families import Family

_ROUTERS = ("gate", "router")
# What some routers add to the scores by which they choose, and not to those that they weigh by.
_CORRECTION = "e_score_correction_bias"


def expert_block(model: nn.Module, family: Family, layer: int) -> nn.Module:
    """What has the experts and the router of a layer. Raises ModelError where nothing has."""
    place = model.get_submodule(family.layer_name(layer, "").rstrip("."))
    names = family.experts.modules if family.experts else ()
    for block in (getattr(place, name, None) for name in names):
        if isinstance(block, nn.Module) and _router_name(block):
            return block
    raise ModelError(
        f"layer {layer}: no router in {' or '.join(names) or 'a model without experts'}, as this "
        "version of transformers makes it. Use another version."
    )


def router(block: nn.Module) -> nn.Module:
    """The router of an `expert_block`."""
    return block.get_submodule(_router_name(block))


def _router_name(block: nn.Module) -> str:
    names = (name for name in _ROUTERS if isinstance(getattr(block, name, None), nn.Module))
    return next(names, "")


@contextmanager
def without_experts(block: nn.Module, gone: Collection[int]) -> Iterator[None]:
    """Inside, the router of an `expert_block` gives the experts `gone` logits of -inf, which is
    what a router without their rows computes of the others."""
    chooses: Any = router(block)
    forward, dropped = chooses.forward, torch.tensor(sorted(gone), dtype=torch.long)

    def masked(*args: Any, **kwargs: Any) -> Any:
        with _Unrouted(dropped):
            return forward(*args, **kwargs)

    with ExitStack() as stack:
        for name, values in (*block.named_parameters(), *block.named_buffers()):
            if name.rpartition(".")[2] == _CORRECTION:
                stack.callback(values.data.copy_, values.data.clone())
                values.data.index_fill_(-1, dropped.to(values.device), -torch.inf)
        chooses.forward = masked
        stack.callback(delattr, chooses, "forward")
        yield


class _Unrouted(TorchFunctionMode):
    """What linear layers compute is -inf for the outputs `gone`."""

    def __init__(self, gone: Tensor) -> None:
        super().__init__()
        self._gone = gone

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is functional.linear:
            return result.index_fill(-1, self._gone.to(result.device), -torch.inf)
        return result

"""Where experts and routers are in a model in memory, whose names versions of transformers change,
and how to keep a router from choosing some experts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from spp_export.common.errors import ModelError
from spp_export.models.families import Family

_ROUTERS = ("gate", "router")
# What some routers add to the scores by which they choose, and not to those that they weigh by.
_CORRECTION = "e_score_correction_bias"


def expert_block(model: nn.Module, family: Family, layer: int) -> nn.Module | None:
    """What has the experts and the router of a layer, which may be the layer itself; None where it
    has none."""
    place = model.get_submodule(family.layer_name(layer, "").rstrip("."))
    names = family.experts.modules if family.experts else ()
    blocks = (place, *(getattr(place, name, None) for name in names)) if names else ()
    found = (block for block in blocks if block is not None and router_of(block) is not None)
    return next(found, None)


def router_of(block: nn.Module) -> nn.Module | None:
    """The router of an `expert_block`; None of another MLP."""
    routers = (getattr(block, name, None) for name in _ROUTERS)
    return next((router for router in routers if isinstance(router, nn.Module)), None)


def check_routed_writes() -> None:
    """ModelError where this version of transformers does not show what single experts write."""
    if int(transformers.__version__.partition(".")[0]) < 5:
        raise ModelError(
            f"choosing experts needs transformers 5 or newer, and {transformers.__version__} is "
            "installed. Install a newer one, or use --units heads."
        )


def routed_writes(experts: Any, inputs: Sequence[Tensor], output: Tensor, count: int) -> Tensor:
    """||g_e f_e(x)||^2 [T,E] of what each of `count` experts writes for each token, weighed by the
    router: 0 where a token is not routed to it.

    `experts` is the module of all of a layer, called with `inputs`: tokens, the experts that each
    is routed to and their weights [T,k], of which `output` has the sum; or tokens that are weighed
    already, expert by expert, and `output` has one for each.
    """
    if len(inputs) == 1:
        squares: Tensor = output.float().square().sum(-1)
        return squares.view(count, -1).T
    tokens, chosen, weights = inputs
    writes = tokens.new_zeros((len(tokens), count), dtype=torch.float32)
    for place in range(chosen.shape[1]):
        one = slice(place, place + 1)
        write = experts.forward(tokens, chosen[:, one], weights[:, one])
        writes.scatter_add_(1, chosen[:, one], write.float().square().sum(-1, keepdim=True))
    return writes


@contextmanager
def without_experts(block: nn.Module, gone: Collection[int]) -> Iterator[None]:
    """Inside, the router of an `expert_block` gives the experts `gone` logits of -inf, which is
    what a router without their rows computes of the others."""
    chooses: Any = router_of(block)
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

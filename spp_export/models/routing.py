"""Where experts and routers are in a model in memory, whose names versions of transformers change,
and how to keep a router from choosing some experts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
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
# What transformers calls what reads the channels of experts, by whatever name it is stored.
_DOWN, _DOWN_BIAS = "down_proj", "down_proj_bias"
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


def routed_channels(experts: Any, inputs: Sequence[Tensor], count: int, wide: int) -> Tensor:
    """What each expert that a token is routed to gives to its down projection, times its weight by
    the router: [T,k*(1+F)], k rows of the number of the expert and its F channels.

    `experts` and `inputs` are as of `routed_writes`; `wide` is the axis of the channels in their
    down projections [E,...], by whatever way these are computed: the projections are made to copy
    as many channels as they have outputs, and all is computed once more, until all are copied.
    """
    down, bias = _present(experts.down_proj), getattr(experts, _DOWN_BIAS, None)
    width, hidden = down.shape[wide], down.shape[3 - wide]
    saved = down.data, None if bias is None else bias.data
    parts: list[Tensor] = []
    try:
        if bias is not None:
            bias.data = torch.zeros_like(bias)
        for start in range(0, width, hidden):
            size = min(hidden, width - start)
            copies = torch.zeros_like(down[0])
            places = torch.arange(size, device=copies.device)
            at = (places, places + start) if wide == 2 else (places + start, places)
            copies[at] = 1
            down.data = copies.expand(count, -1, -1).contiguous()
            parts.append(_by_place(experts, inputs, count)[..., :size])
    finally:
        down.data = saved[0]
        if bias is not None:
            bias.data = saved[1]
    values = torch.cat(parts, dim=-1)
    shown: Tensor = torch.cat([_chosen(inputs, count).to(values)[..., None], values], dim=-1)
    return shown.flatten(1)


def _by_place(experts: Any, inputs: Sequence[Tensor], count: int) -> Tensor:
    """What experts write for each token, [T,k,d]: by the first that it is routed to, and so on."""
    if len(inputs) == 1:
        written: Tensor = experts.forward(*inputs).unflatten(0, (count, -1)).float()
        places = _chosen(inputs, count).T[..., None].expand(-1, -1, written.shape[-1])
        return written.gather(0, places).transpose(0, 1)
    tokens, chosen, weights = inputs
    each = [slice(place, place + 1) for place in range(chosen.shape[1])]
    return torch.stack(
        [experts.forward(tokens, chosen[:, one], weights[:, one]).float() for one in each], dim=1
    )


def _chosen(inputs: Sequence[Tensor], count: int) -> Tensor:
    """The experts that each token is routed to [T,k]."""
    if len(inputs) > 1:
        return inputs[1]
    # Tokens that are weighed already, expert by expert: those of the others are 0.
    routed = inputs[0].unflatten(0, (count, -1)).abs().sum(-1) > 0
    most = max(int(routed.sum(0).max()), 1)
    found: Tensor = routed.float().topk(most, dim=0).indices
    return found.T


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


@contextmanager
def without_channels(
    block: nn.Module, family: Family, kept: Mapping[int, Collection[int]]
) -> Iterator[None]:
    """Inside, the experts of an `expert_block` write nothing of their channels but those `kept`, by
    the number of the expert: their columns of its down projection are zeros."""
    with ExitStack() as stack, torch.no_grad():
        for expert, channels in kept.items():
            weight, axis = _down_weight(block, family, expert)
            stay = set(channels)
            gone = torch.tensor(
                [c for c in range(weight.shape[axis]) if c not in stay],
                dtype=torch.long,
                device=weight.device,
            )
            before = weight.index_select(axis, gone).clone()
            weight.index_fill_(axis, gone, 0)
            stack.callback(_put_back, weight, axis, gone, before)
        yield


@torch.no_grad()
def _put_back(weight: Tensor, axis: int, places: Tensor, values: Tensor) -> None:
    weight.index_copy_(axis, places, values)


def _down_weight(block: nn.Module, family: Family, expert: int) -> tuple[Tensor, int]:
    """The weight of one expert of an `expert_block` that reads its channels, and their axis."""
    assert family.experts is not None
    names = (_DOWN, family.experts.down)
    for name, parameter in block.named_parameters():
        if parameter.dim() == 3 and any(part in names for part in name.split(".")):
            return _present(parameter)[expert], family.experts.down_axis - 1
    # Transformers 4 has a module for each.
    own: Any = block.get_submodule(f"experts.{expert}")
    module = next(getattr(own, name) for name in names if hasattr(own, name))
    return _present(module.weight), 1


def _present(weight: Tensor) -> Tensor:
    """A weight whose values can be changed where it is. Raises ModelError where they are elsewhere,
    and only come when a module runs."""
    if weight.is_meta:
        raise ModelError(
            "the weights of experts are offloaded, and their channels can be told apart in memory "
            "alone. Use --device cpu, or --units heads."
        )
    return weight


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

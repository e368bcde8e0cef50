"""Which implementation is the fastest, as far as it was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Region:
    """Shapes of problems on CUDA cards of one compute capability."""

    capability: tuple[int, int]
    batch: range
    queries: range
    keys: range


# Where `python -m spp_campaigns.ragged` found `triton` the faster in every case of the region. It
# has not run on a card yet.
TRITON_WINS: tuple[Region, ...] = ()


def fastest(query: Tensor, key: Tensor) -> Literal["sdpa", "triton"]:
    """`triton`, which has no gradients, where it was measured to be the faster for tensors of these
    shapes, else `sdpa`."""
    trained = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    if not query.is_cuda or query.dtype == torch.float64 or trained:
        return "sdpa"
    capability = torch.cuda.get_device_capability(query.device)
    won = measured_faster(capability, query.shape[0], query.shape[2], key.shape[2])
    return "triton" if won else "sdpa"


def measured_faster(capability: tuple[int, int], batch: int, queries: int, keys: int) -> bool:
    """Whether the problem lies in a region where `triton` won."""
    return any(
        region.capability == capability
        and batch in region.batch
        and queries in region.queries
        and keys in region.keys
        for region in TRITON_WINS
    )

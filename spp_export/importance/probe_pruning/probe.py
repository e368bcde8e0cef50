"""Which tokens of a batch are probed, and the second moments they give by position.

Padding is on the right. It takes no part in anything: a pad has no residual norm, columns and rows
without a real token do not count towards the sizes of batch and probe and rank below every real
one, and where the rectangle of kept samples and positions still crosses a pad, no token attends to
it and no mean counts it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# One position in two, one sample in twenty, and never fewer positions than this.
_POSITIONS_PER_KEPT = 2
_SAMPLES_PER_KEPT = 20
_LEAST_POSITIONS = 2
# A probe as short as this always starts at the first token.
_SHORT = 10


@dataclass(frozen=True)
class Probe:
    """Kept samples [kb] and positions [ks], ascending, and which of their tokens are real [kb,ks].

    One set of positions serves all samples.
    """

    samples: Tensor
    positions: Tensor
    real: Tensor

    def take(self, values: Tensor) -> Tensor:
        """The probe's part [kb,ks,...] of a batch [B,S,...]."""
        return values.index_select(0, self.samples).index_select(1, self.positions)


def whole(real_BS: Tensor) -> Probe:
    """The probe that is the batch itself, for full-batch probing."""
    return _probe(
        torch.arange(real_BS.shape[0], device=real_BS.device),
        torch.arange(real_BS.shape[1], device=real_BS.device),
        real_BS,
    )


def choose(residual: Tensor, real_BS: Tensor, *, longest: int | None = None) -> Probe:
    """The tokens of largest residual norm: positions of the whole batch first, then samples.

    residual: the stream [B,S,d] before the block's norm; real_BS: False at pads. Only the first
    `longest` positions are open, those a history reaches.
    """
    real = real_BS.to(residual.device).clone()
    if longest is not None:
        real[:, longest:] = False
    # filled, not multiplied: a pad's infinity must not become NaN
    norms = wide(residual).norm(dim=-1).masked_fill(~real, 0.0)
    length, size = int(real.any(0).sum()), int(real.any(1).sum())
    kept = min(max(-(-length // _POSITIONS_PER_KEPT), _LEAST_POSITIONS), length)
    positions = _top(norms.norm(dim=0).masked_fill(~real.any(0), -1.0), kept)
    if kept <= _SHORT:
        positions[0] = 0
    norms, real_kept = norms[:, positions], real[:, positions]
    strength = norms.norm(dim=1).masked_fill(~real_kept.any(1), -1.0)
    return _probe(_top(strength, -(-size // _SAMPLES_PER_KEPT)), positions, real)


class PositionMoments:
    """Running second moments [S,C] by position, over samples that have a real token there."""

    def __init__(self, positions: int) -> None:
        self._positions = positions
        self._sums: Tensor | None = None
        self.counts = torch.zeros(positions)

    def add(self, values: Tensor, probe: Probe) -> None:
        """Take inputs [kb,ks,C] of a consumer, those of the probe's tokens; pads are left out."""
        squares = wide(values).square().masked_fill(~probe.real[..., None], 0.0).sum(0)
        if self._sums is None:
            self._sums = squares.new_zeros(self._positions, squares.shape[1])
            self.counts = self.counts.to(squares)
        self._sums.index_add_(0, probe.positions, squares)
        self.counts.index_add_(0, probe.positions, probe.real.sum(0).to(self.counts))

    @property
    def values(self) -> Tensor:
        """Means [S,C]; zeros at positions never seen."""
        assert self._sums is not None, "nothing was added"
        return self._sums / self.counts.clamp(min=1)[:, None]


def wide(values: Tensor) -> Tensor:
    """At least fp32: squares of large activations overflow half precision."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _probe(samples: Tensor, positions: Tensor, real: Tensor) -> Probe:
    return Probe(samples, positions, real[samples][:, positions])


def _top(strength: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest, ascending; the first of equals."""
    return strength.argsort(descending=True, stable=True)[:count].sort().values

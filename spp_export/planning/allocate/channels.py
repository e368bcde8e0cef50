"""The widths that a layer's MLP may have, and the channels that are best for each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from spp_export.common.arrays import BoolArray, FloatArray, IntArray
from spp_export.models.shape import ModelShape, channel_widths
from spp_export.planning.allocate.scores import checked, places


@dataclass(frozen=True, slots=True)
class ChannelOptions:
    """The widths of L layers of I channels; each keeps the channels of every smaller one.

    widths: ascending, the last is I. value: [L,W], the worth of every width. rank: [L,I], the
    place of a channel in its layer, best first.
    """

    widths: tuple[int, ...]
    value: FloatArray
    rank: IntArray

    def kept(self, widths: ArrayLike) -> BoolArray:
        """Kept channels [L,I] at `widths` [L]."""
        return self.rank < np.reshape(widths, (-1, 1))


def channel_options(scores_LI: ArrayLike, shape: ModelShape, multiple: int = 64) -> ChannelOptions:
    """All widths of every layer with the channels of highest score, ties to the lowest index.

    scores_LI: [L,I] finite, of any sign. Widths are the multiples of `multiple`, and I.

    Raises PlanError for scores of another shape or that are not finite.
    """
    layers, channels = shape.num_layers, shape.channels
    scores = checked(scores_LI, layers, channels, unit="channel", plural="channels")
    widths = channel_widths(channels, multiple)
    order = np.argsort(-scores, axis=-1, kind="stable")
    kept_score = np.cumsum(np.take_along_axis(scores, order, axis=-1), axis=-1)
    return ChannelOptions(widths, kept_score[:, np.array(widths) - 1], places(order, axis=-1))

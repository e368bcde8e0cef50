"""Sizes that a server can spread over several cards, each with a share of every layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from spp_export.common.arrays import BoolArray, FloatArray, IntArray
from spp_export.common.errors import PlanError
from spp_export.models.shape import LayerShape
from spp_export.planning.allocate.channels import ChannelOptions
from spp_export.planning.allocate.heads import Options, regular_sizes


@dataclass(frozen=True, slots=True)
class _Allowed:
    """Options of which only some sizes [G,N] may be chosen."""

    options: Options
    allowed: BoolArray

    @property
    def value(self) -> FloatArray:
        """Worth of every size [L,G,N], -inf where it may not be chosen."""
        return np.where(self.allowed, self.options.value, -np.inf)

    @property
    def query_heads(self) -> IntArray:
        """Query heads of every size [G,N]."""
        return self.options.query_heads

    def kept(self, groups: ArrayLike, heads: ArrayLike) -> BoolArray:
        """Kept query heads [L,G,g] at `groups` [L] KV groups and a count [L] of `heads`."""
        return self.options.kept(groups, heads)


def splittable_heads(options: Options, ways: int) -> Options:
    """The same options without regular sizes that do not divide among `ways` cards.

    Raises PlanError where some layer then has no size left: its whitelist may need more groups.
    """
    if ways == 1:
        return options
    groups, heads = regular_sizes(*options.value.shape[1:])
    sizes = [[LayerShape(int(a * b), int(a), ways) for b in heads[0]] for a in groups[:, 0]]
    allowed = np.array([[size.splits(ways) for size in row] for row in sizes])
    found = _Allowed(options, allowed)
    empty = np.flatnonzero((found.value == -np.inf).all(axis=(1, 2)))
    if len(empty):
        raise PlanError(
            f"layer {empty[0]}: no number of heads that it may keep divides among {ways} cards. "
            "Use a smaller --tp."
        )
    return found


def splittable_channels(options: ChannelOptions, ways: int) -> ChannelOptions:
    """The same options without widths that do not divide among `ways` cards.

    Raises PlanError where none is left.
    """
    allowed = np.array(options.widths) % ways == 0
    if not allowed.any():
        raise PlanError(
            f"no width of an MLP divides among {ways} cards: widths are {options.widths[0]} to "
            f"{options.widths[-1]}. Choose --width-multiple as a multiple of {ways}."
        )
    return replace(options, value=np.where(allowed, options.value, -np.inf))

"""The sizes that a layer may have, what each is worth, and the units that are best for it.

A regular layer keeps `a` KV groups and `b` query heads in each of them. A ragged one keeps any of
its query heads, and a KV group of which none is kept goes: its size is the number of KV groups and
of query heads that are left, however these are spread. An MLP keeps a width of its channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spp_export.common.arrays import BoolArray, FloatArray, IntArray
from spp_export.common.errors import PlanError
from spp_export.models.shape import LayerShape, ModelShape, channel_widths
from spp_export.planning.knapsack import on_grid

_LARGEST_SCORE = 1e100


def per_parameter(scores_LU: ArrayLike, parameters: float) -> FloatArray:
    """Worth [L,U] of units of `parameters` each whose scores say how much a parameter is worth.

    For criteria whose scores only rank units: heads and channels then compete as in FLAP (An et
    al., arXiv 2312.11983), where one threshold on the score holds for all of them and each counts
    by its cost. A number added to all scores adds as much as the budget allows to every choice
    that uses it up, so it changes none of them.
    """
    return np.asarray(scores_LU, dtype=np.float64) * parameters


def checked(scores_LU: ArrayLike, layers: int, units: int, *, unit: str, plural: str) -> FloatArray:
    """Scores [L,U] on a grid where their sums are exact; PlanError unless they fit and are finite.

    unit and plural name what is scored.
    """
    scores = np.asarray(scores_LU, dtype=np.float64)
    if scores.shape != (layers, units):
        raise PlanError(
            f"scores have shape {list(scores.shape)} but the model needs {[layers, units]} "
            f"(layers, {plural}). Use artifacts made for this model."
        )
    if not (ordinary := np.abs(scores) <= _LARGEST_SCORE).all():
        layer, index = np.argwhere(~ordinary)[0]
        raise PlanError(
            f"layer {layer}: the score of {unit} {index} is {scores[layer, index]}, expected a "
            f"finite number of at most {_LARGEST_SCORE:g}. Make the artifacts again."
        )
    return on_grid(scores, scores.size)


def places(order: NDArray[np.intp], axis: int) -> IntArray:
    """Place of every entry in `order` along `axis`: the inverse permutation."""
    axis %= order.ndim
    along = np.arange(order.shape[axis]).reshape(
        [-1 if i == axis else 1 for i in range(order.ndim)]
    )
    rank = np.empty(order.shape, dtype=np.int64)
    np.put_along_axis(rank, order, np.broadcast_to(along, order.shape), axis=axis)
    return rank


@dataclass(frozen=True, slots=True)
class Options(ABC):
    """What every size of every layer keeps and what that is worth.

    A size is a number of KV groups and a count n of query heads: in each group for regular layers,
    in all for ragged ones. value: [L,G,N], entry [l,a-1,n-1] the worth of layer l with a groups,
    -inf where there is no such set of heads, or none that holds the forced ones. nothing: [L], the
    worth of a layer without attention, -inf where it holds forced heads; None where every layer
    keeps some, so that no size has 0 groups.
    """

    value: FloatArray
    ragged: bool = field(default=False, kw_only=True)
    nothing: FloatArray | None = field(default=None, kw_only=True)

    @property
    def query_heads(self) -> IntArray:
        """Query heads of every size, in all groups [G,N]."""
        groups, heads = regular_sizes(*self.value.shape[1:])
        return heads * np.ones_like(groups) if self.ragged else groups * heads

    @abstractmethod
    def kept(self, groups: ArrayLike, heads: ArrayLike) -> BoolArray:
        """Kept query heads [L,G,g] at `groups` [L] KV groups and a count [L] of `heads`."""


@dataclass(frozen=True, slots=True)
class SetOptions(Options):
    """Options from a criterion that weighs whole sets: the best set of every size.

    sets: [L,G,N,G,g], entry [l,a-1,n-1] the query heads kept.
    """

    sets: BoolArray

    def kept(self, groups: ArrayLike, heads: ArrayLike) -> BoolArray:
        """As of `Options`."""
        groups_L, heads_L = np.broadcast_arrays(groups, heads)
        kept: BoolArray = self.sets[np.arange(len(self.value)), groups_L - 1, heads_L - 1]
        return kept & (groups_L > 0)[:, None, None]


def with_nothing(options: Options, worth_L: ArrayLike, forced_LH: BoolArray) -> Options:
    """The same options and, at this worth, a layer without attention where no head is forced."""
    worth = np.broadcast_to(np.asarray(worth_L, dtype=np.float64), len(forced_LH))
    return replace(options, nothing=np.where(forced_LH.any(axis=1), -np.inf, worth))


@dataclass(frozen=True, slots=True)
class LayerOptions(Options):
    """The regular sizes of L layers with G groups of g query heads, and the best heads for each.

    head_rank: [L,G,g], place of a head in its group, best first. group_rank: [L,G,g], entry
    [l,k,b-1] the place of group k among the groups of b heads.
    """

    head_rank: IntArray
    group_rank: IntArray

    def kept(self, groups: ArrayLike, heads: ArrayLike) -> BoolArray:
        """As of `Options`."""
        groups_L, heads_L = np.broadcast_arrays(groups, heads)
        layers = np.arange(len(self.value))
        kept_groups = self.group_rank[layers, :, heads_L - 1] < groups_L[:, None]
        return kept_groups[:, :, None] & (self.head_rank < heads_L[:, None, None])


def layer_options(
    scores_LH: ArrayLike, shape: ModelShape, forced_LH: BoolArray | None = None
) -> LayerOptions:
    """All regular sizes of every layer with the heads of highest score, ties to the lowest index.

    scores_LH: [L,H] finite, of any sign; H is the number of query heads. forced_LH: [L,H], heads
    that every option keeps: their groups are kept and every kept group has room for them.

    Raises PlanError for scores of another shape or that are not finite.
    """
    forced, order, kept_score = ranked_heads(scores_LH, shape, forced_LH)
    _, groups, size = kept_score.shape
    forced_heads = forced.sum(axis=-1)
    forced_groups = np.broadcast_to((forced_heads > 0)[:, :, None], kept_score.shape)
    group_order = np.lexsort((-kept_score, ~forced_groups), axis=1)
    value = np.cumsum(np.take_along_axis(kept_score, group_order, axis=1), axis=1)
    too_few_groups = np.arange(1, groups + 1) < (forced_heads > 0).sum(axis=1)[:, None]
    too_few_heads = np.arange(1, size + 1) < forced_heads.max(axis=1)[:, None]
    value[too_few_groups[:, :, None] | too_few_heads[:, None, :]] = -np.inf
    return LayerOptions(value, places(order, axis=-1), places(group_order, axis=1))


def ranked_heads(
    scores_LH: ArrayLike, shape: ModelShape, forced_LH: BoolArray | None
) -> tuple[BoolArray, NDArray[np.intp], FloatArray]:
    """Heads of every group by score, forced ones first; all [L,G,g].

    The forced ones; the order in which heads are kept, indices in their group; and what the first
    heads in that order score together. Raises PlanError as `layer_options` does.
    """
    size = (shape.num_layers, shape.kv_heads, shape.group_size)
    flat = checked(scores_LH, size[0], shape.query_heads, unit="query head", plural="query heads")
    scores = flat.reshape(size)
    forced = np.zeros(size, dtype=bool)
    if forced_LH is not None:
        forced |= forced_LH.reshape(size)
    order = np.lexsort((-scores, ~forced), axis=-1)
    return forced, order, np.cumsum(np.take_along_axis(scores, order, axis=-1), axis=-1)


def regular_sizes(groups: int, group_size: int) -> tuple[IntArray, IntArray]:
    """KV groups and query heads per group of every regular size, [G,1] and [1,g]."""
    return np.arange(1, groups + 1)[:, None], np.arange(1, group_size + 1)[None, :]


@dataclass(frozen=True, slots=True)
class RaggedOptions(Options):
    """The ragged sizes of L layers with G groups of g of all H query heads, and the best heads.

    head_rank: [L,G,g], place of a head in its group, best first. taken: [G,L,G+1,H+1], entry
    [k,l,a,q] how many heads of group k are in the best set of q heads of a groups among the groups
    0 to k.
    """

    head_rank: IntArray
    taken: IntArray
    ragged: bool = field(default=True, kw_only=True)

    def kept(self, groups: ArrayLike, heads: ArrayLike) -> BoolArray:
        """As of `Options`."""
        layers = np.arange(len(self.value))
        left_groups, left = (np.array(np.broadcast_to(n, layers.shape)) for n in (groups, heads))
        counts = np.zeros(self.head_rank.shape[:2], dtype=np.int64)
        for k in reversed(range(len(self.taken))):
            counts[:, k] = self.taken[k, layers, left_groups, left]
            left_groups -= counts[:, k] > 0
            left -= counts[:, k]
        kept: BoolArray = self.head_rank < counts[:, :, None]
        return kept


def ragged_options(
    scores_LH: ArrayLike, shape: ModelShape, forced_LH: BoolArray | None = None
) -> RaggedOptions:
    """All ragged sizes of every layer, each with the set of heads of highest score. Exact.

    Inside a group the best heads go together, ties to the lowest index; how many of each group is
    settled by dynamic programming over the groups, ties to the first of them. scores_LH and
    forced_LH, [L,H], are as for `layer_options`.

    Raises PlanError for scores of another shape or that are not finite.
    """
    forced, order, kept_score = ranked_heads(scores_LH, shape, forced_LH)
    layers, groups, size = kept_score.shape
    heads = groups * size
    worth = np.concatenate([np.zeros((layers, groups, 1)), kept_score], axis=-1)
    too_few = np.arange(size + 1) < forced.sum(axis=-1)[:, :, None]
    worth[too_few] = -np.inf

    best = np.zeros((layers, 1, 1))
    taken = np.zeros((groups, layers, groups + 1, heads + 1), dtype=np.int64)
    for k in range(groups):
        # So far there are at most k groups, with k*g heads.
        _, a, q = best.shape
        grown = np.full((size + 1, layers, a + 1, q + size), -np.inf)
        grown[0, :, :-1, :q] = best + worth[:, k, :1, None]
        for n in range(1, size + 1):
            grown[n, :, 1:, n : n + q] = best + worth[:, k, n, None, None]
        taken[k, :, : a + 1, : q + size] = grown.argmax(axis=0)
        best = grown.max(axis=0)
    return RaggedOptions(best[:, 1:, 1:], places(order, axis=-1), taken)


@dataclass(frozen=True, slots=True)
class NestedOptions:
    """The widths of L layers of I channels; each keeps the units of every smaller one.

    widths: ascending, the last is I. value: [L,W], the worth of every width. rank: [L,I], the
    place of a unit in its layer, best first.
    """

    widths: tuple[int, ...]
    value: FloatArray
    rank: IntArray

    def kept(self, widths: ArrayLike) -> BoolArray:
        """Kept units [L,I] at `widths` [L]."""
        return self.rank < np.reshape(widths, (-1, 1))


def channel_options(
    scores_LI: ArrayLike, shape: ModelShape, multiple: int = 64, *, none: bool = False
) -> NestedOptions:
    """All widths of every layer with the channels of highest score, ties to the lowest index.

    scores_LI: [L,I] finite, of any sign. Widths are the multiples of `multiple`, and I; with `none`
    also 0, a layer without an MLP.

    Raises PlanError for scores of another shape or that are not finite.
    """
    layers, channels = shape.num_layers, shape.channels
    scores = checked(scores_LI, layers, channels, unit="channel", plural="channels")
    return _nested(scores, channel_widths(channels, multiple, none=none))


@dataclass(frozen=True, slots=True)
class ExpertOptions:
    """Every number of experts that the S layers which have any may keep, with every width of these.

    counts and widths: ascending, the last are E and F. value: [S,C,W], the worth of every size.
    rank: [S,W,E], the place of an expert among those of a width, best first. channels: the places
    [S,E,F] of channels in their expert; None where all of them stay.
    """

    counts: tuple[int, ...]
    widths: tuple[int, ...]
    value: FloatArray
    rank: IntArray
    channels: IntArray | None = None

    def places(self, counts: ArrayLike, widths: ArrayLike) -> tuple[IntArray, IntArray]:
        """Where sizes [S] are in `value`, along its second and third axis."""
        return np.searchsorted(self.counts, counts), np.searchsorted(self.widths, widths)

    def kept(self, counts: ArrayLike, widths: ArrayLike) -> tuple[BoolArray, BoolArray | None]:
        """Kept experts [S,E] at these sizes [S], and channels [S,E,F] of all experts."""
        _, at = self.places(counts, widths)
        experts = self.rank[np.arange(len(self.rank)), at] < np.reshape(counts, (-1, 1))
        if self.channels is None:
            return experts, None
        return experts, self.channels < np.reshape(widths, (-1, 1, 1))


# Options of widths, along the last axis of their values.
_Widths = TypeVar("_Widths", NestedOptions, ExpertOptions)


def expert_options(
    scores_SE: ArrayLike,
    shape: ModelShape,
    channels_SU: ArrayLike | None = None,
    multiple: int = 64,
) -> ExpertOptions:
    """All numbers of experts that the S layers which have any may keep, with those of highest
    score, ties to the lowest index; where a token is routed to groups of them, as many of each.

    scores_SE: [S,E] finite, of any sign. channels_SU: [S,E*F], expert by expert, at least 0; where
    these are given, experts may also be narrower, to multiples of `multiple`, and one then has the
    share of its score that its channels keep of theirs. Raises PlanError as `channel_options` does.
    """
    layers, experts, width = sum(shape.sparse), shape.experts, shape.expert_channels
    scores = checked(scores_SE, layers, experts, unit="expert", plural="experts")
    counts = shape.expert_counts
    widths: tuple[int, ...] = (width,)
    channels, of_width = None, scores[:, None]
    if channels_SU is not None:
        nested = _channels_of_experts(channels_SU, shape, multiple)
        widths, channels = nested.widths, nested.rank.reshape(layers, experts, width)
        whole = nested.value[:, -1:]
        even = np.broadcast_to(np.array(widths) / width, nested.value.shape)
        share = np.divide(nested.value, whole, out=even.copy(), where=whole > 0)
        of_width = (scores.reshape(-1, 1) * share).reshape(layers, experts, -1).swapaxes(1, 2)
    best = [_of_groups(rows, shape) for rows in of_width.swapaxes(0, 1)]
    value = np.stack([options.value for options in best], axis=2)
    return ExpertOptions(
        counts, widths, value, np.stack([options.rank for options in best], axis=1), channels
    )


def expert_channel_options(
    scores_SU: ArrayLike, shape: ModelShape, multiple: int = 64
) -> ExpertOptions:
    """All widths that the experts of the S layers which have any may keep, each with its own
    channels of highest score, ties to the lowest index; all experts stay.

    scores_SU: [S,E*F] finite, of any sign, expert by expert. Widths are the multiples of
    `multiple`, and F. Raises PlanError as `channel_options` does.
    """
    nested = _channels_of_experts(scores_SU, shape, multiple)
    sizes = (sum(shape.sparse), shape.experts)
    value = nested.value.reshape(*sizes, -1).sum(axis=1)
    rank = np.broadcast_to(np.arange(shape.experts), (*value.shape, shape.experts))
    channels = nested.rank.reshape(*sizes, shape.expert_channels)
    return ExpertOptions((shape.experts,), nested.widths, value[:, None], rank, channels)


def _channels_of_experts(scores_SU: ArrayLike, shape: ModelShape, multiple: int) -> NestedOptions:
    """Widths of every expert [S*E,F] of the layers that have any."""
    rows, width = sum(shape.sparse), shape.expert_channels
    names = {"unit": "channel", "plural": "channels of all experts"}
    flat = checked(scores_SU, rows, shape.experts * width, **names)
    return _nested(flat.reshape(-1, width), channel_widths(width, multiple))


def _of_groups(scores: FloatArray, shape: ModelShape) -> NestedOptions:
    """Options that keep as many of every group of experts: the best of every group, then the second
    of every group, and so on."""
    layers, experts = scores.shape
    groups = scores.reshape(layers, shape.expert_groups, -1)
    best = np.argsort(-groups, axis=-1, kind="stable")
    best += np.arange(0, experts, experts // shape.expert_groups)[:, None]
    return _ordered(scores, best.swapaxes(1, 2).reshape(layers, experts), shape.expert_counts)


def _nested(scores: FloatArray, widths: tuple[int, ...]) -> NestedOptions:
    return _ordered(scores, np.argsort(-scores, axis=-1, kind="stable"), widths)


def _ordered(scores: FloatArray, order: IntArray, widths: tuple[int, ...]) -> NestedOptions:
    """Options that keep the first units in an order, of [L,I] scores."""
    kept_score = np.cumsum(np.take_along_axis(scores, order, axis=-1), axis=-1)
    kept_score = np.pad(kept_score, ((0, 0), (1, 0)))
    return NestedOptions(widths, kept_score[:, np.array(widths)], places(order, axis=-1))


def splittable_heads(options: Options, ways: int) -> Options:
    """The same options without regular sizes that do not divide among `ways` cards.

    Raises PlanError where some layer then has no size left: its whitelist may need more groups.
    """
    if ways == 1:
        return options
    groups, heads = regular_sizes(*options.value.shape[1:])
    sizes = [[LayerShape(int(a * b), int(a), ways) for b in heads[0]] for a in groups[:, 0]]
    allowed = np.array([[size.splits(ways) for size in row] for row in sizes])
    value = np.where(allowed, options.value, -np.inf)
    empty = np.flatnonzero((value == -np.inf).all(axis=(1, 2)))
    if len(empty):
        raise PlanError(
            f"layer {empty[0]}: no number of heads that it may keep divides among {ways} cards. "
            "Use a smaller --tp."
        )
    return replace(options, value=value)


def dividing_heads(options: Options) -> Options:
    """The same options without numbers of KV groups that do not divide the dense model's."""
    groups = options.value.shape[1]
    allowed = groups % np.arange(1, groups + 1) == 0
    return replace(options, value=np.where(allowed[:, None], options.value, -np.inf))


def splittable_channels(options: _Widths, ways: int) -> _Widths:
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

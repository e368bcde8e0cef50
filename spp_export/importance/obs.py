"""`obs`: the loss in a layer's output when units are removed and the rest is re-fitted.

Removing inputs R of a projection W with inputs of second moment C and re-fitting the rest by least
squares leaves the error `tr(W_R (P_RR)^-1 W_R^T)`, `P = C^-1`: the block form of the optimal brain
surgeon (Hassibi and Stork, 1993; Frantar and Alistarh, arXiv 2208.11580, Eq. 3). After each removal
the re-fitted weights and P are those of what is left, so removals compose exactly. Heads are blocks
of o_proj's inputs; a channel is one of down_proj's, and costs `||W'_c||^2 / P_cc`.

Errors of different layers are put in one currency, the relative change of the residual stream, by
`E 1/||r_l||^2`: every later block normalises the stream, so a change counts by its size relative
to it. On the default model this factor follows the mean squared gradient of the loss closely, and
needs no gradient. Output-only.

This is a criterion over sets, not a sum over units, so it gives the loss of every size of a layer
instead of scores. The loss of a set is exact; which sets are looked at is greedy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from spp_export.common.arrays import BoolArray, FloatArray, IndexArray
from spp_export.importance.base import Convention, SetCriterion
from spp_export.models.shape import channel_widths

# Keeps P finite where the text excites fewer directions than there are inputs.
_RIDGE = 0.01
# The next 32 channels to go are looked for among the 64 that cost least. On correlated moments of
# 1,536 channels the losses are those of all channels looked at each time, in a tenth of the time,
# also where channels come in near copies; without a reserve, copies go together, at twice the loss.
_CHUNK = 32
_RESERVE = 2


def _noise_of(mean_square: float) -> float:
    """Variance of the white noise added to inputs of this mean square."""
    # A layer whose input is all zero loses as good as nothing, whatever goes.
    return _RIDGE * mean_square if mean_square > 0 else 1e-30


def _gram_and_precision(
    weight: FloatArray, second: FloatArray, noise: float
) -> tuple[FloatArray, FloatArray]:
    """W^T W and P = (C + noise I)^-1 in float64, of weights [d,m] and second moments [m,m]."""
    moments = second.astype(np.float64)
    moments[np.diag_indices_from(moments)] += noise
    whole = weight.astype(np.float64)
    return whole.T @ whole, np.linalg.inv(moments)


def _eliminate(
    gram: FloatArray, precision: FloatArray, gone: IndexArray
) -> tuple[FloatArray, FloatArray]:
    """Both matrices of what is left, re-fitted, when the inputs `gone` are removed."""
    stay = np.delete(np.arange(len(gram)), gone)
    across = precision[np.ix_(gone, stay)]
    # W' = W_S - W_R step; its Gram matrix follows in one product and its transpose.
    step = np.linalg.solve(precision[np.ix_(gone, gone)], across)
    half = gram[np.ix_(stay, gone)] - 0.5 * step.T @ gram[np.ix_(gone, gone)]
    change = half @ step
    return (
        gram[np.ix_(stay, stay)] - change - change.T,
        precision[np.ix_(stay, stay)] - across.T @ step,
    )


def head_losses(
    weight: FloatArray, second: FloatArray, forced: BoolArray, *, ragged: bool = False
) -> tuple[FloatArray, BoolArray]:
    """As of `HeadLosses`; heads are removed greedily."""
    return (_ragged_losses if ragged else _regular_losses)(weight, second, forced)


def _regular_losses(
    weight: FloatArray, second: FloatArray, forced_Gg: BoolArray
) -> tuple[FloatArray, BoolArray]:
    """Loss [G,g] and heads kept [G,g,G,g] of groups of equal size: the better of two orders, heads
    first and groups first."""
    groups, size = forced_Gg.shape
    losses = np.full((groups, size), np.inf)
    kept = np.zeros((groups, size, groups, size), dtype=bool)

    def record(state: _Removal) -> None:
        a = int(state.kept.any(axis=1).sum())
        b = int(state.kept.sum(axis=1).max())
        if state.loss < losses[a - 1, b - 1]:
            losses[a - 1, b - 1] = state.loss
            kept[a - 1, b - 1] = state.kept

    groups_first = _Removal.start(weight, second, forced_Gg)
    heads_first = groups_first.copy()
    for b in range(size, 0, -1):
        if not heads_first.thin(b):
            break
        branch = heads_first.copy()
        record(branch)
        while branch.drop_group():
            record(branch)
    while True:
        branch = groups_first.copy()
        for b in range(size, 0, -1):
            if not branch.thin(b):
                break
            record(branch)
        if not groups_first.drop_group():
            return losses, kept


def _ragged_losses(
    weight: FloatArray, second: FloatArray, forced_Gg: BoolArray
) -> tuple[FloatArray, BoolArray]:
    """Loss [G,H] and heads kept [G,H,G,g] of groups of any size.

    Whole groups are removed greedily, and from the layer with each number of them gone single
    heads, but for the last of a group; every step is a size of its own. The sets of
    `_regular_losses` count as well, so no regular size loses more than it does there.
    """
    groups, size = forced_Gg.shape
    losses = np.full((groups, groups * size), np.inf)
    kept = np.zeros((*losses.shape, groups, size), dtype=bool)
    regular, sets = _regular_losses(weight, second, forced_Gg)
    for a, b in np.ndindex(groups, size):
        losses[a, (a + 1) * (b + 1) - 1] = regular[a, b]
        kept[a, (a + 1) * (b + 1) - 1] = sets[a, b]

    whole = _Removal.start(weight, second, forced_Gg)
    while True:
        branch = whole.copy()
        while branch.drop_head():
            a, q = branch.kept.any(axis=1).sum() - 1, branch.kept.sum() - 1
            if branch.loss < losses[a, q]:
                losses[a, q] = branch.loss
                kept[a, q] = branch.kept
        if not whole.drop_group():
            return losses, kept


@dataclass
class _Removal:
    """A layer with some heads gone and the rest re-fitted: all that further removals need.

    gram: W'^T W' and precision: P of what is left, [r,r], in blocks of head_dim, one per head of
    `heads`. kept [G,g]; loss so far.
    """

    gram: FloatArray
    precision: FloatArray
    heads: IndexArray
    forced: BoolArray
    kept: BoolArray
    loss: float

    @classmethod
    def start(cls, weight: FloatArray, second: FloatArray, forced: BoolArray) -> _Removal:
        """The dense layer."""
        noise = _noise_of(float(np.mean(np.diag(second), dtype=np.float64)))
        gram, precision = _gram_and_precision(weight, second, noise)
        heads = np.arange(forced.size)
        return cls(gram, precision, heads, forced, np.ones_like(forced), 0.0)

    def copy(self) -> _Removal:
        """An independent state to continue from; matrices are replaced, never changed."""
        return replace(self, kept=self.kept.copy())

    def thin(self, heads: int) -> bool:
        """Bring every kept group to `heads` query heads; False where forced heads forbid it."""
        while True:
            crowded = self.kept.sum(axis=1) > heads
            if not crowded.any():
                return True
            free = self.kept & ~self.forced & crowded[:, None]
            if not free.any(axis=1)[crowded].all():
                return False
            self._remove_cheapest([np.array([head]) for head in np.flatnonzero(free)])

    def drop_head(self) -> bool:
        """Remove the cheapest head that is not its group's last; False where none is free."""
        shared = self.kept.sum(axis=1) > 1
        free = np.flatnonzero(self.kept & ~self.forced & shared[:, None])
        if not free.size:
            return False
        self._remove_cheapest([np.array([head]) for head in free])
        return True

    def drop_group(self) -> bool:
        """Remove the cheapest whole group; False for the last one or where all are forced."""
        present = self.kept.any(axis=1)
        free = np.flatnonzero(present & ~(self.kept & self.forced).any(axis=1))
        if present.sum() < 2 or not free.size:
            return False
        size = self.kept.shape[1]
        self._remove_cheapest([k * size + np.flatnonzero(self.kept[k]) for k in free])
        return True

    def _remove_cheapest(self, candidates: list[IndexArray]) -> None:
        costs = [self._cost(self._elements(heads)) for heads in candidates]
        best = int(np.argmin(costs))
        gone = self._elements(candidates[best])
        self.gram, self.precision = _eliminate(self.gram, self.precision, gone)
        self.heads = np.setdiff1d(self.heads, candidates[best])
        self.kept.reshape(-1)[candidates[best]] = False
        self.loss += costs[best]

    def _cost(self, gone: IndexArray) -> float:
        block = np.ix_(gone, gone)
        return max(float(np.trace(np.linalg.solve(self.precision[block], self.gram[block]))), 0.0)

    def _elements(self, heads: IndexArray) -> IndexArray:
        """Rows of `gram` that belong to heads."""
        dim = len(self.gram) // len(self.heads)
        places = np.searchsorted(self.heads, heads)
        elements: IndexArray = (places[:, None] * dim + np.arange(dim)).reshape(-1)
        return elements


def attention_loss(weight: FloatArray, second: FloatArray) -> float:
    """What is lost with all heads: the energy of all that o_proj [d,m] writes, by the second
    moments [m,m] of its input. No set of heads loses more."""
    noise = _noise_of(float(np.mean(np.diag(second), dtype=np.float64)))
    whole, moments = weight.astype(np.float64), second.astype(np.float64)
    moments[np.diag_indices_from(moments)] += noise
    return float(np.sum((whole @ moments) * whole))


def channel_losses(
    weight: FloatArray,
    blocks: FloatArray,
    multiple: int,
    *,
    none: bool = False,
    chunk: int = _CHUNK,
) -> tuple[FloatArray, IndexArray]:
    """As of `ChannelLosses`, moments between blocks taken for zero. Channels are removed greedily,
    `chunk` before all of them are weighed again; each set is a subset of the one before."""
    channels = weight.shape[1]
    noise = _noise_of(sum(float(np.trace(block, dtype=np.float64)) for block in blocks) / channels)
    order, costs = [], []
    for start, block in zip(range(0, channels, blocks.shape[-1]), blocks, strict=True):
        part = weight[:, start : start + len(block)]
        inside = block[: part.shape[1], : part.shape[1]]
        removed, cost = _removal(*_gram_and_precision(part, inside, noise), chunk)
        order.append(start + removed)
        costs.append(cost)
    # Blocks do not see each other: at each step the one goes on whose next channel costs least.
    turn = np.argsort(
        np.concatenate([np.maximum.accumulate(cost) for cost in costs]), kind="stable"
    )
    lost = np.append(0.0, np.cumsum(np.concatenate(costs)[turn]))
    place = np.empty(channels, dtype=np.intp)
    place[np.concatenate(order)[turn]] = np.arange(channels)[::-1]
    return lost[channels - np.array(channel_widths(channels, multiple, none=none))], place


def _removal(gram: FloatArray, precision: FloatArray, chunk: int) -> tuple[IndexArray, FloatArray]:
    """All inputs [m] in the order in which they go, and what each adds to the loss."""
    left = np.arange(len(gram))
    order, costs = [], []
    while left.size:
        gone, cost = _cheapest(gram, precision, chunk)
        gram, precision = _eliminate(gram, precision, gone)
        order.append(left[gone])
        costs.append(cost)
        left = np.delete(left, gone)
    return np.concatenate(order), np.concatenate(costs)


def _cheapest(gram: FloatArray, precision: FloatArray, count: int) -> tuple[IndexArray, FloatArray]:
    """The next inputs to go, in order, and the cost of each after those before it.

    Exact within the candidates: what a removal does to their entries needs no others.
    """
    count = min(count, len(gram))
    candidates = np.argsort(_single_costs(gram, precision), kind="stable")[: _RESERVE * count]
    among = np.ix_(candidates, candidates)
    gram, precision = gram[among], precision[among]
    gone, costs = np.empty(count, dtype=np.intp), np.empty(count)
    for place in range(count):
        cost = _single_costs(gram, precision)
        best = cost.argmin()
        gone[place], costs[place] = candidates[best], max(cost[best], 0.0)
        gram, precision = _eliminate(gram, precision, np.array([best]))
        candidates = np.delete(candidates, best)
    return gone, costs


def _single_costs(gram: FloatArray, precision: FloatArray) -> FloatArray:
    """What removing each input alone loses, [m]."""
    costs: FloatArray = np.diag(gram) / np.diag(precision)
    return costs


CRITERION = SetCriterion(
    name="obs",
    source="Optimal Brain Surgeon (Hassibi and Stork, 1993), heads in blocks, greedy",
    convention=Convention.OUTPUT_ONLY,
    heads=head_losses,
    channels=channel_losses,
    attention=attention_loss,
    experts="energy",
)

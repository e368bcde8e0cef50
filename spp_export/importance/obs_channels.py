"""`obs` for MLP channels: what is lost of down_proj's output when channels go and the rest is
re-fitted.

The optimal brain surgeon as in `obs`, one channel at a time: removing channel c costs
`||W'_c||^2 / P_cc`, W' the weights re-fitted so far and P the inverse second moments of what is
left. Each set of channels is a subset of the one before, so an order says it all. Output-only.
"""

from __future__ import annotations

import numpy as np

from spp_export.calibration.statistics import FloatArray
from spp_export.importance.obs import IndexArray, eliminate, gram_and_precision, noise_of
from spp_export.models.shape import channel_widths

# The next 32 channels to go are looked for among the 64 that cost least. On correlated moments of
# 1,536 channels the losses are those of all channels looked at each time, in a tenth of the time,
# also where channels come in near copies; without a reserve, copies go together, at twice the loss.
_CHUNK = 32
_RESERVE = 2


def channel_removal(
    weight: FloatArray, blocks: FloatArray, multiple: int, *, chunk: int = _CHUNK
) -> tuple[FloatArray, IndexArray]:
    """Loss [W] of a layer at each of its `channel_widths`, and the place [I] of its channels, best
    first: a width w keeps those of place below w.

    weight: down_proj [d,I]; blocks: E[z z^T] of its input in diagonal blocks [n,b,b] of b channels,
    zeros after the last channel. The loss is E ||W z - W' z_S||^2, moments between blocks taken for
    zero. Channels are removed greedily, `chunk` before all of them are weighed again.
    """
    channels = weight.shape[1]
    noise = noise_of(sum(float(np.trace(block, dtype=np.float64)) for block in blocks) / channels)
    order, costs = [], []
    for start, block in zip(range(0, channels, blocks.shape[-1]), blocks, strict=True):
        part = weight[:, start : start + len(block)]
        inside = block[: part.shape[1], : part.shape[1]]
        removed, cost = _removal(*gram_and_precision(part, inside, noise), chunk)
        order.append(start + removed)
        costs.append(cost)
    # Blocks do not see each other: at each step the one goes on whose next channel costs least.
    turn = np.argsort(
        np.concatenate([np.maximum.accumulate(cost) for cost in costs]), kind="stable"
    )
    lost = np.append(0.0, np.cumsum(np.concatenate(costs)[turn]))
    place = np.empty(channels, dtype=np.intp)
    place[np.concatenate(order)[turn]] = np.arange(channels)[::-1]
    return lost[channels - np.array(channel_widths(channels, multiple))], place


def _removal(gram: FloatArray, precision: FloatArray, chunk: int) -> tuple[IndexArray, FloatArray]:
    """All inputs [m] in the order in which they go, and what each adds to the loss."""
    left = np.arange(len(gram))
    order, costs = [], []
    while left.size:
        gone, cost = _cheapest(gram, precision, chunk)
        gram, precision = eliminate(gram, precision, gone)
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
        gram, precision = eliminate(gram, precision, np.array([best]))
        candidates = np.delete(candidates, best)
    return gone, costs


def _single_costs(gram: FloatArray, precision: FloatArray) -> FloatArray:
    """What removing each input alone loses, [m]."""
    costs: FloatArray = np.diag(gram) / np.diag(precision)
    return costs

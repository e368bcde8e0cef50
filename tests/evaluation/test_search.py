"""The smallest model within a limit, against every plan of a frontier."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest

from spp_export.common.errors import BudgetError, QualityError
from spp_export.evaluation.remarks import Wanted
from spp_export.evaluation.search import PlanSearch, TriedPlan
from spp_export.planning.planner import PlanResult
from spp_export.planning.request import FRONTIER_SHARES

DENSE = 1_000_000
GRID = np.arange(1, 500) / 500


@dataclass(frozen=True)
class _Plan:
    budget: dict = field(default_factory=lambda: {"asked": {}})


class _Curve(PlanSearch):
    """Plans of a model whose units are a `share` of it, none that keeps less than `least`, and
    their KL by the share that is kept."""

    def __init__(self, kl, share, least=0.0):
        self.tried, self._kl, self._units, self._least = {}, kl, share * DENSE, least

    def at(self, keep):
        if keep not in self.tried:
            if keep < self._least:
                raise BudgetError("no such model is that small")
            parameters = round(DENSE - self._units * (1 - keep))
            sizes = SimpleNamespace(parameters=parameters, dense_parameters=DENSE)
            result = PlanResult(_Plan(), None, None, sizes)
            kl = float(self._kl(keep))
            quality = SimpleNamespace(mean_kl=kl, top1=1 - kl / 2)
            self.tried[keep] = TriedPlan(keep, result, quality)
        return self.tried[keep]


def _smooth(rng):
    """A KL that rises with what is removed."""
    scale, power = rng.uniform(0.5, 4), rng.uniform(1, 3)
    return lambda keep: scale * (1 - keep) ** power


def _uneven(rng):
    """One that does not rise with every step: every two hundredth of the way is up to a twelfth
    higher or lower than it would be."""
    smooth, noise = _smooth(rng), rng.uniform(-0.08, 0.08, 201)
    return lambda keep: smooth(keep) * (1 + noise[int(200 * keep)])


@pytest.mark.parametrize(
    ("curve", "shares", "most"), [(_smooth, GRID, 10), (_uneven, FRONTIER_SHARES, 16)]
)
def test_as_small_as_the_best_plan_of_a_frontier(curve, shares, most):
    """Nothing above the limit, and within 2 % of the smallest of all plans that hold it: of a fine
    grid where quality falls with every step, else of those that `spp frontier` tries."""
    worst, tried = 1.0, []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        kl, share = curve(rng), rng.choice([0.2, 0.8, 0.95])
        search, every = _Curve(kl, share), _Curve(kl, share)
        limit = float(kl(rng.uniform(0.3, 0.94)))
        wanted = Wanted(max_kl=limit) if seed % 2 else Wanted(same_token=1 - limit / 2)
        plans = [every.at(float(keep)) for keep in shares]
        held = [one for one in plans if wanted.held_by(one.quality.mean_kl, one.quality.top1)]
        found = search.smallest(wanted)
        assert wanted.held_by(found.quality.mean_kl, found.quality.top1)
        best = min([one.parameters for one in held], default=found.parameters)
        worst = max(worst, found.parameters / best)
        tried.append(len(search.tried))
    assert worst <= 1.02
    assert max(tried) <= most


def test_no_plan_is_small_enough_or_near_enough():
    kl = _smooth(np.random.default_rng(0))
    found = _Curve(kl, 0.8, least=0.6).smallest(Wanted(max_kl=100))
    assert 0.6 <= found.keep < 0.62
    with pytest.raises(QualityError, match=r"no plan that removes anything holds it\. The nearest"):
        _Curve(lambda keep: 0.1, 0.8).smallest(Wanted(max_kl=0.05))

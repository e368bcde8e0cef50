"""Plans whose cost is a measured latency, against every combination of regular sizes."""

from __future__ import annotations

import itertools
import re
from functools import reduce

import numpy as np
import pytest
from latency_tables import document, table, times, write
from planning import mask_of, model_shape, regular_masks

from spp_export.common.errors import BudgetError, PlanError, ProfileError, UsageError
from spp_export.planning import compile_units
from spp_export.planning.allocate.options import channel_options, layer_options, ragged_options
from spp_export.planning.budget import Budget
from spp_export.planning.latency import ascending, read_latency_table

CASES = [(2, 4, 2, 6, 2), (2, 2, 2, 7, 3), (1, 4, 1, 5, 8), (3, 2, 1, 4, 2)]


class Case:
    """Random scores and times of a tiny model, and every plan there is for it.

    Every width is measured, so that nothing is interpolated; times of wider blocks are no less.
    """

    def __init__(self, rng, tmp_path, units):
        layers, query, kv, channels, multiple = CASES[rng.integers(len(CASES))]
        self.units = units
        self.shape = model_shape(layers, query, kv, channels=channels)
        self.scores = rng.normal(1, 1, (layers, query))
        self.channel_scores = rng.normal(1, 1, (layers, channels))
        heads = layer_options(self.scores, self.shape)
        self.heads = None if units == "channels" else heads
        found = channel_options(self.channel_scores, self.shape, multiple)
        self.channels = None if units == "heads" else found
        self.widths = list(found.widths)
        self.document = document(self.shape, rng, self.widths)
        seconds = sorted(row["seconds"] for row in self.document["mlp"])
        for row, each in zip(self.document["mlp"], seconds, strict=True):
            row |= times(each)
        self.table = read_latency_table(write(tmp_path / "t.json", self.document))

    def attention(self, mask):
        """Nanoseconds of a kept set, straight from the document."""
        groups = int(mask.reshape(self.shape.kv_heads, -1).any(axis=1).sum())
        for row in self.document["attention"]:
            if (row["query_heads"], row["kv_heads"]) == (int(mask.sum()), groups):
                return round(row["seconds"] * 1e9)
        raise AssertionError("a shape that was not measured")

    def options(self, layer):
        """(score, nanoseconds) of every size of a layer's two blocks, of those that may change."""
        kinds = []
        if self.units != "channels":
            kinds.append(
                [
                    (self.scores[layer][mask].sum(), self.attention(mask))
                    for mask in regular_masks(self.shape)
                ]
            )
        if self.units != "heads":
            ranked = np.sort(self.channel_scores[layer])[::-1]
            rows = self.document["mlp"]
            kinds.append([(ranked[: r["channels"]].sum(), round(r["seconds"] * 1e9)) for r in rows])
        return kinds

    def totals(self):
        """Score and cost of every plan, flat."""
        kinds = [kind for layer in range(self.shape.num_layers) for kind in self.options(layer)]
        return (
            reduce(
                np.add.outer, [np.array([entry[at] for entry in kind]) for kind in kinds]
            ).ravel()
            for at in (0, 1)
        )

    def cost(self, layers):
        """Nanoseconds of the blocks of a compiled plan, straight from the document."""
        total = 0
        for plan in layers:
            width = self.shape.channels if plan.channels is None else len(plan.channels)
            if self.units != "channels":
                total += self.attention(mask_of(plan, self.shape))
            if self.units != "heads":
                total += round(self.document["mlp"][self.widths.index(width)]["seconds"] * 1e9)
        return total

    def compile(self, nanoseconds, layout="per-layer"):
        """The plan of a limit on the units' blocks, asked for as one on the whole step."""
        step = nanoseconds + self.table.fixed_cost(self.shape, self.units)
        budget = Budget(max_latency=step / 1e6, units=self.units, cost="latency")
        return compile_units(
            self.heads, self.channels, self.shape, budget, layout, latency=self.table
        )


@pytest.mark.parametrize("units", ["heads", "channels", "both"])
def test_per_layer_is_optimal(tmp_path, units):
    rng = np.random.default_rng(3)
    for _ in range(25):
        case = Case(rng, tmp_path, units)
        scores, costs = case.totals()
        limits = np.unique(costs)
        for limit in rng.choice(limits, min(6, len(limits)), replace=False).tolist():
            layers, realised = case.compile(limit)
            assert realised.score == pytest.approx(scores[costs <= limit].max(), abs=1e-12)
            assert realised.score_bound == realised.score
            assert realised.cost == case.cost(layers) <= realised.limit == limit
            assert realised.kind == "latency"
        with pytest.raises(BudgetError, match="the fastest blocks measured") as caught:
            case.compile(int(limits[0]) - 1)
        least = float(re.search(r"Ask for max_latency ([\d.e-]+) or more\.$", str(caught.value))[1])
        budget = Budget(max_latency=least, units=units, cost="latency")
        compile_units(case.heads, case.channels, case.shape, budget, latency=case.table)


def test_uniform_is_optimal(tmp_path):
    rng = np.random.default_rng(4)
    for _ in range(20):
        case = Case(rng, tmp_path, "both")
        best = {}
        shape = case.shape
        masks = regular_masks(shape)
        for row in case.document["mlp"]:
            ranked = np.sort(case.channel_scores, axis=1)[:, ::-1][:, : row["channels"]].sum()
            for size in {(int(m.sum()), case.attention(m)) for m in masks}:
                of_size = [m for m in masks if (int(m.sum()), case.attention(m)) == size]
                score = sum(
                    max(case.scores[layer][mask].sum() for mask in of_size)
                    for layer in range(shape.num_layers)
                )
                cost = shape.num_layers * (size[1] + round(row["seconds"] * 1e9))
                best[*size, row["channels"]] = (score + ranked, cost)
        for _, limit in best.values():
            layers, realised = case.compile(limit, "uniform")
            within = max(score for score, cost in best.values() if cost <= limit)
            assert realised.score == pytest.approx(within, abs=1e-12)
            assert realised.cost == case.cost(layers) <= limit
            assert len({plan.shape(shape) for plan in layers}) == 1


@pytest.mark.parametrize("units", ["heads", "channels", "both"])
def test_keep_is_a_share_of_the_units_own_blocks(tmp_path, units):
    rng = np.random.default_rng(5)
    case = Case(rng, tmp_path, units)
    dense = case.table.block_cost(case.shape.layers, units)
    budget = Budget(keep=0.9, units=units, cost="latency")
    limit = budget.limit(case.shape, latency=case.table)
    assert limit.cost == 9 * dense // 10
    assert budget.to_dict()["cost"] == "latency"
    strong = Budget(strength=0.5, units=units, cost="latency")
    assert strong.limit(case.shape, 0.2, case.table).cost == pytest.approx(0.64 * dense, abs=1)


def test_a_share_that_cannot_be_met_names_one_that_can(tmp_path):
    case = Case(np.random.default_rng(6), tmp_path, "both")

    def compiled(keep):
        budget = Budget(keep=keep, units="both", cost="latency")
        return compile_units(case.heads, case.channels, case.shape, budget, latency=case.table)

    with pytest.raises(BudgetError, match="of the latency of head and channel blocks") as caught:
        compiled(0.01)
    least = float(re.search(r"Ask for keep ([\d.]+) or more", str(caught.value))[1])
    compiled(least)
    with pytest.raises(BudgetError):
        compiled(least - 2e-4)


def test_a_share_of_the_cache(tmp_path):
    """Cost kv-bytes drops groups, and query heads only with them."""
    shape = model_shape(2, 4, 2)
    scores = np.array([[1.0, 2, 3, 4], [8, 7, 6, 5]])
    budget = Budget(keep=0.75, cost="kv-bytes")
    layers, realised = compile_units(layer_options(scores, shape), None, shape, budget)
    assert realised.kind == "kv-bytes"
    assert realised.limit == 0.75 * shape.kv_bytes_per_token(shape.layers)
    assert [plan.query_heads for plan in layers] == [(2, 3), (0, 1, 2, 3)]
    with pytest.raises(BudgetError, match=r"0\.5000 of the bytes of KV cache"):
        compile_units(layer_options(scores, shape), None, shape, Budget(keep=0.1, cost="kv-bytes"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.5, "cost": "time"}, "cost must be one of params, kv-bytes, latency"),
        (
            {"max_params": 5, "cost": "latency"},
            "max_params is no limit on cost latency; use cost p",
        ),
        ({"max_kv_bytes": 5, "cost": "latency"}, "max_kv_bytes is no limit on cost latency"),
        ({"max_latency": 5.0}, "max_latency is no limit on cost params; use cost latency"),
        ({"max_latency": 0, "cost": "latency"}, "max_latency must be a positive number, got 0"),
        ({"max_latency": float("nan"), "cost": "latency"}, "must be a positive number, got nan"),
        ({"max_latency": float("inf"), "cost": "latency"}, "must be a positive number, got inf"),
        ({"max_latency": True, "cost": "latency"}, "must be a positive number, got True"),
        ({"keep": 0.5, "cost": "kv-bytes", "units": "both"}, "cost kv-bytes limits heads"),
    ],
)
def test_malformed_budgets(options, message):
    with pytest.raises(UsageError, match=message):
        Budget(**options)


def test_a_limit_in_kv_bytes_needs_no_word_for_its_cost():
    for cost in ("params", "kv-bytes"):
        assert Budget(max_kv_bytes=7, cost=cost).limit(model_shape()).kind == "kv-bytes"


def test_what_a_table_does_not_know(tmp_path):
    shape = model_shape(2, 4, 2)
    rng = np.random.default_rng(7)
    scores, budget = rng.normal(1, 1, (2, 4)), Budget(keep=0.9, cost="latency")
    options = layer_options(scores, shape)
    with pytest.raises(UsageError, match="cost latency needs a table"):
        compile_units(options, None, shape, budget)
    other = table(tmp_path, model_shape(2, 4, 2, hidden_size=12), rng)
    with pytest.raises(ProfileError, match="with hidden_size 12 but this one has 8"):
        compile_units(options, None, shape, budget, latency=other)
    ragged = ragged_options(scores, shape)
    with pytest.raises(PlanError, match="regular layers only"):
        compile_units(ragged, None, shape, budget, "ragged", latency=table(tmp_path, shape, rng))


def test_interpolation_is_monotone(tmp_path):
    rng = np.random.default_rng(8)
    for _ in range(50):
        widths = sorted({*rng.integers(1, 90, 7).tolist(), 90})
        found = table(tmp_path, model_shape(channels=90), rng, widths)
        costs = found.mlp_cost(range(1, 91))
        assert (np.diff(costs) >= 0).all()
        assert costs[0] == found.mlp_cost(widths)[0]
        assert costs.min() >= round(min(found.mlp.values()) * 1e9)
        assert costs.max() <= round(max(found.mlp.values()) * 1e9)


def test_interpolation_is_linear_between_ascending_times(tmp_path):
    value = document(model_shape(channels=30), np.random.default_rng(9), [10, 20, 30])
    for row, seconds in zip(value["mlp"], (1e-6, 3e-6, 4e-6), strict=True):
        row |= times(seconds)
    found = read_latency_table(write(tmp_path / "t.json", value))
    assert found.mlp_cost([5, 10, 15, 20, 22, 30]).tolist() == [1000, 1000, 2000, 3000, 3200, 4000]


def test_ascending_is_the_closest_by_least_squares():
    """Against every way to pool neighbours, of which the best ascending one is the answer."""
    rng = np.random.default_rng(10)
    for _ in range(60):
        numbers = rng.integers(0, 6, rng.integers(1, 7)).astype(float)
        best = np.inf
        for cuts in itertools.product([False, True], repeat=len(numbers) - 1):
            pools = np.split(numbers, np.flatnonzero(cuts) + 1)
            fitted = np.concatenate([np.full(len(pool), pool.mean()) for pool in pools])
            if (np.diff(fitted) >= 0).all():
                best = min(best, ((fitted - numbers) ** 2).sum())
        found = np.array(ascending(numbers.tolist()))
        assert (np.diff(found) >= 0).all()
        assert ((found - numbers) ** 2).sum() == pytest.approx(best, abs=1e-12)

"""Budgets of quality: the frontier of sizes, and the smallest model within a limit of KL."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial

import pytest
from rich.console import Console

import spp_export
from spp_bench import device_rates
from spp_cli.render.frontier import frontier_table
from spp_export.commands import frontier
from spp_export.common.errors import QualityError, UsageError
from spp_export.data.artifacts import open_artifacts
from spp_export.data.scenario import read_scenario
from spp_export.evaluation.remarks import Wanted
from spp_export.evaluation.search import PlanSearch, TriedPlan, knee, try_shares
from spp_export.models.session import open_session
from spp_export.planning.plan_file import read_plan
from spp_export.planning.planner import Planning
from spp_export.planning.request import FRONTIER_SHARES, PlanRequest

NAME = "llama-gqa-bias"
SHARES = (0.9, 0.75, 0.5)


@pytest.fixture(scope="module")
def options(workshop):
    return {
        "model": str(workshop.dense(NAME)),
        "artifacts": workshop.artifacts(NAME),
        "units": "both",
        "width_multiple": 1,
        "answer_tokens": 12,
    }


@pytest.fixture(scope="module")
def drawn(workshop, options, tmp_path_factory):
    place = tmp_path_factory.mktemp("frontier") / "out"
    return spp_export.frontier(workshop.scenario, place, share=SHARES, **options)


def test_every_share_has_a_plan_and_its_quality(drawn):
    assert [plan.keep for plan in drawn.plans] == sorted(SHARES, reverse=True)
    sizes = [plan.parameters for plan in drawn.plans]
    assert sizes == sorted(sizes, reverse=True)
    assert drawn.knee in drawn.plans
    written = json.loads((drawn.path / "frontier.json").read_text())
    assert written == json.loads(json.dumps(drawn.to_dict()))
    for entry, plan in zip(written["plans"], drawn.plans, strict=True):
        assert read_plan(drawn.path / entry["plan"]).layers == plan.result.plan.layers
    assert (drawn.path / "frontier.png").stat().st_size > 1000


def test_the_quality_is_the_one_that_an_export_of_the_plan_has(drawn, workshop, options, tmp_path):
    at = drawn.plans[-1]
    exported = spp_export.export(
        workshop.scenario,
        output=tmp_path / "out",
        plan=drawn.files[-1],
        model=options["model"],
        artifacts=options["artifacts"],
    )
    quality = exported.report["quality"]
    assert quality["tokens"] == at.quality.tokens
    assert quality["mean_kl"] == pytest.approx(at.quality.mean_kl, rel=1e-3, abs=1e-6)


def test_the_speed_of_every_plan_is_measured_beside_the_dense_model(
    workshop, options, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(device_rates, "_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(device_rates, "_WIDTH", {"cpu": 16})
    few = partial(frontier._bench(), rounds=2, new_tokens=2)
    monkeypatch.setattr(frontier, "_bench", lambda: few)
    place = tmp_path / "out"
    drawn = spp_export.frontier(
        workshop.scenario, place, share=(0.75, 0.5), measure=True, **options
    )
    plans = json.loads((place / "frontier.json").read_text())["plans"]
    for speed, entry in zip(drawn.speeds, plans, strict=True):
        assert entry["measured"] == json.loads(json.dumps(asdict(speed)))
        assert (speed.batch, speed.context) == (1, 128)
        assert min(speed.tokens_per_second, speed.dense_tokens_per_second) > 0
        assert {"median", "p20", "p80", "bound"} <= speed.speedup.keys()
    assert {path.name for path in place.iterdir()} == {
        "frontier.json",
        "frontier.png",
        "manifest.json",
        "plans",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    Console(width=150).print(frontier_table(drawn))
    table = capsys.readouterr().out
    for speed in drawn.speeds:
        assert f"{speed.speedup['median']:.2f}x" in table
    with pytest.raises(UsageError, match="--measure times on cpu or cuda, and not on mps"):
        spp_export.frontier(workshop.scenario, place, measure=True, device="mps")


def test_the_smallest_model_within_a_limit(drawn, workshop, options, tmp_path):
    limit = drawn.plans[1].quality.mean_kl * 1.1
    exported = spp_export.export(
        workshop.scenario, output=tmp_path / "out", max_kl=limit, **options
    )
    assert exported.report["quality"]["mean_kl"] <= limit
    assert exported.report["distance_gate"]["passed"]
    assert exported.predicted.parameters <= drawn.plans[1].parameters
    assert exported.plan.budget["asked"]["max_kl"] == limit


def test_the_smallest_model_that_finds_the_same_tokens(drawn, workshop, options, tmp_path):
    share = drawn.plans[1].quality.top1 * 0.99
    exported = spp_export.export(
        workshop.scenario, output=tmp_path / "out", same_token=share, **options
    )
    assert exported.report["quality"]["top1"] >= share
    assert exported.report["distance_gate"] == {"same_token": share, "passed": True}
    assert exported.predicted.parameters <= drawn.plans[1].parameters
    assert exported.plan.budget["asked"]["same_token"] == share


@pytest.mark.parametrize("seed", range(3))
def test_no_plan_of_the_frontier_is_smaller_by_two_percent(workshop, options, seed):
    """On a random model, whose KL need not rise with what is removed; answers differ by seed."""
    session = open_session(options["model"])
    artifacts = open_artifacts(options["artifacts"], options["model"], session.source)
    request = PlanRequest(units="both", width_multiple=1, answer_tokens=12, seed=seed)
    planning = Planning.begin(session, artifacts, read_scenario(workshop.scenario), request)
    plans = try_shares(PlanSearch(planning), FRONTIER_SHARES)
    search = PlanSearch(planning)
    for plan in plans:
        wanted = Wanted(max_kl=plan.quality.mean_kl * 1.02)
        held = [one for one in plans if wanted.held_by(one.quality.mean_kl, one.quality.top1)]
        found = search.smallest(wanted)
        assert found.quality.mean_kl <= wanted.max_kl
        assert found.parameters <= 1.02 * min(one.parameters for one in held)


def test_a_limit_that_no_plan_holds(workshop, options, tmp_path):
    with pytest.raises(QualityError, match=r"--max-kl 1e-12: no plan that removes anything"):
        spp_export.export(workshop.scenario, output=tmp_path / "out", max_kl=1e-12, **options)
    assert not (tmp_path / "out").exists()


def test_refused_before_any_work(workshop, options, tmp_path):
    with pytest.raises(UsageError, match="frontier tries many budgets"):
        spp_export.frontier(workshop.scenario, tmp_path / "out", keep=0.8, **options)
    short = tmp_path / "short.txt"
    short.write_text("One.\n\nTwo, which is another.")
    with pytest.raises(UsageError, match="a budget of quality needs held-out text"):
        spp_export.export(short, output=tmp_path / "out", max_kl=0.1, **options)


class _Sized:
    def __init__(self, parameters):
        self.predicted = self
        self.parameters = parameters


class _Kl:
    def __init__(self, mean_kl):
        self.mean_kl = mean_kl


def test_the_knee_is_where_quality_begins_to_fall_fast():
    figures = [(100, 0.0), (90, 0.01), (80, 0.02), (70, 0.5), (60, 1.0)]
    plans = [TriedPlan(size / 100, _Sized(size), _Kl(kl)) for size, kl in figures]
    assert knee(plans).keep == 0.8
    assert knee(plans[:1]) is plans[0]

"""`plan` and `export` with a table of latency: what is asked, refused and recorded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from exporting import nothing_begun, refused, tree

from spp_bench.profile import ProfileRequest, Target, profile
from spp_export.common.errors import BudgetError, ProfileError, UsageError
from spp_export.planning import read_plan
from spp_export.planning.latency import read_latency_table

NAME = "llama-gqa-bias"
QUICK = ProfileRequest(context=9, rounds=1, threads=1, width_multiple=16)


@pytest.fixture(scope="module")
def measured(workshop, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "table.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spp_bench.blocks._COLD_BYTES", 1)
        profile(Target.of_model(str(workshop.dense(NAME))), path, request=QUICK)
    return path


@pytest.fixture
def even(workshop, measured, tmp_path) -> Path:
    """The table with times that grow with the sizes, so that what can be kept is known."""
    value = json.loads(measured.read_text())
    for row in (*value["attention"], *value["mlp"], value["rest"]):
        count = row.get("channels", 0) + row.get("query_heads", 0) + 2 * row.get("kv_heads", 0)
        row |= dict.fromkeys(("seconds", "p20", "p80"), 1e-6 * (1 + count))
    path = tmp_path / "even.json"
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
@pytest.mark.parametrize("units", ["heads", "channels", "both"])
def test_the_plan_stays_within_the_share(workshop, even, layout, units):
    asked = {"cost": "latency", "profile": str(even), "layout": layout, "units": units}
    result = workshop.plan(NAME, keep=0.8, compensate="none", width_multiple=16, **asked)
    table, shape = read_latency_table(even), result.shape
    layers = result.plan.layer_shapes(shape)
    dense = table.block_cost(shape.layers, units)
    realised = result.plan.budget["realised"]
    assert realised["cost"] == table.block_cost(layers, units) <= 0.8 * dense
    assert realised["limit"] == 8 * dense // 10
    assert result.predicted.latency.slim == table.step_cost(layers)


def test_the_record_says_which_table_and_what_it_predicts(workshop, even, tmp_path):
    target = tmp_path / "out"
    asked = {"keep": 0.8, "cost": "latency", "profile": str(even), "compensate": "none"}
    workshop.export(NAME, target, **asked)
    plan = read_plan(target / "plan.json")
    sha256 = hashlib.sha256(even.read_bytes()).hexdigest()
    assert plan.budget["asked"] == {"keep": 0.8, "cost": "latency"}
    assert plan.budget["profile"]["sha256"] == sha256
    assert plan.budget["profile"]["context"] == 9
    found = plan.predicted["latency"]
    table, shape = read_latency_table(even), workshop.plan(NAME).shape
    assert found["dense_ms"] == table.step_cost(shape.layers) / 1e6
    assert found["slim_ms"] == table.step_cost(plan.layer_shapes(shape)) / 1e6
    assert found["speedup"] == pytest.approx(found["dense_ms"] / found["slim_ms"], abs=1e-4)
    assert str(even).encode() not in b"".join(tree(target).values())


def test_milliseconds_of_a_whole_step(workshop, even):
    table = read_latency_table(even)
    shape = workshop.plan(NAME).shape
    most = 0.9 * table.step_cost(shape.layers) / 1e6
    asked = {"cost": "latency", "profile": str(even), "compensate": "none"}
    result = workshop.plan(NAME, max_latency=most, **asked)
    assert result.predicted.latency.slim <= most * 1e6 < result.predicted.latency.dense
    assert result.plan.budget["asked"] == {"max_latency": most, "cost": "latency"}
    with (
        nothing_begun(),
        refused(BudgetError, r"budget max_latency 1e-05 is below the smallest plan, .* ms per"),
    ):
        workshop.plan(NAME, max_latency=1e-5, **asked)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"cost": "latency"}, "--cost latency and --profile FILE go together"),
        ({"profile": "FILE"}, "--cost latency and --profile FILE go together"),
        ({"cost": "time"}, "--cost time: expected one of params, kv-bytes, latency"),
        ({"max_latency": 2.0}, "max_latency is no limit on cost params"),
        (
            {"cost": "latency", "profile": "FILE", "max_params": 9},
            "max_params is no limit on cost latency; use cost params",
        ),
        (
            {"cost": "latency", "profile": "FILE", "layout": "ragged"},
            "--layout ragged: tables of latency have regular layers only",
        ),
        (
            {"cost": "kv-bytes", "policy": "published", "strength": 0.3},
            "--policy published takes no --cost",
        ),
        ({"cost": "kv-bytes", "units": "both"}, "cost kv-bytes limits heads"),
    ],
)
def test_what_makes_no_sense(workshop, even, asked, message):
    if "profile" in asked:
        asked = asked | {"profile": str(even)}
    with refused(UsageError, message):
        workshop.plan(NAME, **asked)


def test_a_table_of_another_model(workshop, even):
    asked = {"cost": "latency", "profile": str(even)}
    with refused(ProfileError, "profile: measured for a model with .*'spp bench --profile'"):
        workshop.plan("qwen2-gqa-tied", **asked)


def test_a_table_that_is_none(workshop, tmp_path):
    (tmp_path / "t.json").write_text("{}")
    with refused(ProfileError, "schema_version is null, expected 1"):
        workshop.plan(NAME, cost="latency", profile=str(tmp_path / "t.json"))


def test_a_share_of_the_cache(workshop):
    result = workshop.plan(NAME, keep=0.5, cost="kv-bytes", compensate="none")
    assert result.predicted.kv_bytes <= 0.5 * result.predicted.dense_kv_bytes
    assert result.plan.budget["asked"] == {"keep": 0.5, "cost": "kv-bytes"}
    assert result.predicted.latency is None
    assert "latency" not in result.plan.predicted

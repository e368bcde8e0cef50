"""`--plan FILE`: what decides is in the file, and a file may be written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from exporting import load, logits, masked, refused, tokens, tree, write_plan
from factories import random_layers, shape_of

import spp_export
from spp_export.common.errors import PlanError, UsageError

pytestmark = pytest.mark.thinned(most=3)

NAME = "llama-gqa-bias"


@pytest.fixture
def dense(workshop) -> Path:
    return workshop.dense(NAME)


@pytest.mark.parametrize(
    "name", ["llama-mha-tied", NAME, "mistral-window-tied", "qwen2-mha-window"]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_minimal_plan_needs_no_artifacts(workshop, tmp_path, name, seed):
    dense = workshop.dense(name)
    layers = random_layers(shape_of(dense), seed, channels=seed == 1)
    path = write_plan(tmp_path / "my.json", dense, layers)
    result = spp_export.export(output=tmp_path / "slim", model=str(dense), plan=path)
    assert result.diagnosis is None
    assert result.report["passed"]
    assert result.report["quality"] is None
    slim = load(tmp_path / "slim")
    with masked(dense, layers) as expected:
        assert (logits(slim, tokens()) - logits(expected, tokens())).abs().max().item() == 0.0
    written = json.loads((tmp_path / "slim" / "plan.json").read_text())
    assert set(written) == {"schema_version", "model", "layout", "compensation", "layers"}
    assert "\nA slim version of my-model " in (tmp_path / "slim" / "README.md").read_text()
    assert spp_export.verify(tmp_path / "slim", model=str(dense)).passed


@pytest.mark.parametrize("compensate", ["none", "lstsq", "bias"])
def test_the_plan_of_an_export_makes_it_again(workshop, tmp_path, dense, compensate):
    """All that decided is in the plan, the mixture that weighs the pools included."""
    first = workshop.exported(NAME, "uniform", compensate)
    spp_export.export(
        workshop.scenario,
        tmp_path / first.path.name,
        model=str(dense),
        artifacts=workshop.artifacts(NAME),
        plan=first.path / "plan.json",
    )
    ours, theirs = tree(tmp_path / first.path.name), tree(first.path)
    assert ours.keys() == theirs.keys()
    assert [file for file in theirs if ours[file] != theirs[file]] == []


def test_a_plan_is_repeated_with_the_products_that_it_was_made_with(workshop, tmp_path, dense):
    options = {"model": str(dense), "artifacts": workshop.artifacts(NAME)}

    def made(name: str, **more):
        out = tmp_path / name / "slim"
        spp_export.export(workshop.scenario, out, verify=False, **options, **more)
        return (out / "model.safetensors").read_bytes(), out / "plan.json"

    low, plan = made("low", matmul="bfloat16", answer_tokens=0)
    assert json.loads(plan.read_text())["calibration"]["matmul"] == "bfloat16"
    assert made("again", plan=plan)[0] == low
    assert made("otherwise", matmul="float32", answer_tokens=0)[0] != low
    with refused(UsageError, "--matmul: the plan already decides that."):
        made("both", plan=plan, matmul="float32")
    document = json.loads(plan.read_text())
    document["calibration"]["matmul"] = "fast"
    plan.write_text(json.dumps(document))
    with refused(PlanError, "calibration.matmul must be one of float32, bfloat16, got 'fast'"):
        made("malformed", plan=plan)


@pytest.mark.parametrize(
    "mixture",
    [{"figures": 1.0}, {"figures": 1, "capitals": 0, "small": "0"}, [1, 0, 0], "figures", 0],
    ids=str,
)
def test_a_mixture_of_other_domains_is_refused(workshop, tmp_path, dense, mixture):
    """Where it decides: it weighs the pools of the artifacts."""
    layers = random_layers(shape_of(dense), 0)
    changes = {"compensation": "lstsq", "diagnosis": {"mixture": mixture}}
    path = write_plan(tmp_path / "my.json", dense, layers, **changes)
    with refused(PlanError, "diagnosis.mixture must give each domain .* capitals, figures, small"):
        spp_export.export(
            workshop.scenario,
            tmp_path / "slim",
            model=str(dense),
            artifacts=workshop.artifacts(NAME),
            plan=path,
        )
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "calibration",
    [{"shrinkage": 0.5}, {"shrinkage": 0.5, "scenario_weight": 2}, {"shrinkage": "1"}],
    ids=str,
)
def test_a_mixture_by_no_number_is_refused(workshop, tmp_path, dense, calibration):
    layers = random_layers(shape_of(dense), 0)
    changes = {"compensation": "lstsq", "calibration": calibration}
    path = write_plan(tmp_path / "my.json", dense, layers, **changes)
    with refused(PlanError, r"calibration\.\w+ must be a number from 0 to 1"):
        spp_export.export(workshop.scenario, tmp_path / "slim", model=str(dense), plan=path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_plan_for_another_model_is_refused(workshop, tmp_path, dense):
    other = workshop.dense("qwen3-gqa-tied")
    path = write_plan(tmp_path / "my.json", other, random_layers(shape_of(other), 0))
    with refused(PlanError, "plan is for the model with fingerprint"):
        spp_export.export(output=tmp_path / "slim", model=str(dense), plan=path)
    path = write_plan(tmp_path / "my.json", dense, random_layers(shape_of(dense), 0)[:2])
    with refused(PlanError, "plan has 2 layers but the model has 3"):
        spp_export.export(output=tmp_path / "slim", model=str(dense), plan=path)
    assert not (tmp_path / "slim").exists()


@pytest.mark.parametrize(
    "provenance",
    [
        {"diagnosis": {"mixture": {"chemistry": "much"}}},
        {"diagnosis": {"mixture": {"chemistry": 10**400}}},
        {"diagnosis": {"mixture": [1]}},
        {"scenario": {"name": ["x", "# y\n"]}},
        {"scenario": {"name": "a\n\n# [injected](http://x) `code` <b>\n- injected"}},
        {"budget": {"realised": 3}, "predicted": {"parameters": None}},
    ],
    ids=["text", "huge", "list", "list-name", "markup", "numbers"],
)
def test_provenance_of_a_plan_is_text_from_outside(tmp_path, dense, provenance):
    path = write_plan(tmp_path / "p.json", dense, random_layers(shape_of(dense), 0), **provenance)
    spp_export.export(output=tmp_path / "slim", model=str(dense), plan=path)
    card = (tmp_path / "slim" / "README.md").read_text()
    assert [line for line in card.splitlines() if line.startswith("# ")] == ["# slim"]
    assert not [line for line in card.splitlines() if line.startswith("- injected")]
    assert "[injected](" not in card
    assert "<b>" not in card


def test_options_of_the_plan_beside_a_plan_are_refused(tmp_path, dense):
    path = write_plan(tmp_path / "my.json", dense, random_layers(shape_of(dense), 0))
    with refused(UsageError, "--keep: the plan already decides that"):
        spp_export.export(
            output=tmp_path / "slim",
            model=str(dense),
            plan=path,
            keep=0.5,
        )

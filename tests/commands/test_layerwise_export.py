"""Exports by models that run from disk are those of models in memory, and get the same verdict."""

from __future__ import annotations

import json
from types import SimpleNamespace

import psutil
import pytest
from exporting import tree

import spp_export
from spp_export.common.errors import UsageError
from spp_export.models.session import open_session
from spp_export.planning import planner

pytestmark = pytest.mark.thinned(most=2)

# Every family, layout and compensation; windows, biases, tied and untied heads.
EXPORTS = [
    ("llama-gqa-bias", "ragged", "lstsq"),
    ("mistral-window-tied", "per-layer", "bias"),
    ("qwen2-mha-window", "per-layer", "lstsq"),
    ("qwen3-mqa-bias", "padded", "bias"),
    ("llama-mqa", "uniform", "none"),
]


@pytest.mark.parametrize(("name", "layout", "compensate"), EXPORTS)
def test_an_export_is_the_same_byte_for_byte(
    workshop, tmp_path, monkeypatch, name, layout, compensate
):
    """Diagnosis, statistics, plan, weights, checks and quality; only verify.json says how."""
    found = {}
    for layerwise in (False, True):
        # the second must not find the statistics of the first
        monkeypatch.setenv("SPP_CACHE", str(tmp_path / f"cache-{layerwise}"))
        out = tmp_path / str(layerwise) / "out"
        result = spp_export.export(
            workshop.scenario,
            out,
            model=str(workshop.dense(name)),
            artifacts=workshop.artifacts(name),
            keep=0.7,
            answer_tokens=0,
            layout="ragged" if layout == "padded" else layout,
            compensate=compensate,
            units="heads" if layout == "uniform" else "both",
            width_multiple=8,
            pad=layout == "padded",
            dtype="float64",
            layerwise=layerwise,
        )
        found[layerwise] = tree(out)
        assert result.report["layerwise"] is layerwise
        checked = spp_export.verify(
            out,
            model=str(workshop.dense(name)),
            scenario=workshop.scenario,
            dtype="float64",
            layerwise=not layerwise,
        )
        assert checked.passed
        assert checked.context["layerwise"] is not layerwise
    whole, stream = found[False], found[True]
    reports = [json.loads(files.pop("verify.json")) for files in (whole, stream)]
    assert [report.pop("layerwise") for report in reports] == [False, True]
    assert reports[0] == reports[1]
    assert reports[0]["quality"]["tokens"] > 0
    for files in (whole, stream):
        files.pop("manifest.json")  # has the hash of verify.json
    assert stream == whole


def test_a_diagnosis_and_a_plan_are_the_same(workshop):
    model, artifacts = str(workshop.dense("qwen2-gqa-tied")), workshop.artifacts("qwen2-gqa-tied")
    common = {"model": model, "artifacts": artifacts}
    # A model that runs from disk answers nothing.
    for command, text in ((spp_export.diagnose, {}), (spp_export.plan, {"answer_tokens": 0})):
        one, other = (
            command(workshop.scenario, layerwise=layerwise, **common, **text)
            for layerwise in (False, True)
        )
        # The first one kept statistics for the other.
        assert {**one.to_dict(), "cached": None} == {**other.to_dict(), "cached": None}


def test_a_model_is_read_layer_by_layer_where_two_do_not_fit(workshop, monkeypatch):
    """The dense and the slim one, with a fifth of the memory left for what they compute."""
    model = str(workshop.dense("llama-mqa"))
    shape = open_session(model).source.shape
    need = 2 * 4 * shape.parameters(shape.layers)

    def runs_from_disk(free, **options):
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
        return open_session(model, **options).from_disk

    enough, too_little = need / 0.8 + 1, need / 0.8 - 1
    assert runs_from_disk(too_little, layerwise=None)
    assert not runs_from_disk(enough, layerwise=None)
    assert runs_from_disk(enough, layerwise=True)
    assert not runs_from_disk(too_little, layerwise=False)
    assert not runs_from_disk(too_little)
    assert not runs_from_disk(too_little, layerwise=None, device="auto")  # which offloads by itself
    assert runs_from_disk(enough, layerwise=None, dtype="float64")


def test_several_devices_and_one_layer_at_a_time_exclude_each_other(workshop):
    with pytest.raises(UsageError, match="--layerwise runs on one device"):
        open_session(str(workshop.dense("llama-mqa")), device="auto", layerwise=True)


@pytest.mark.parametrize("criterion", ["taylor", "fisher", "full-batch-probing-scenario"])
def test_criteria_that_need_the_whole_model_say_so(workshop, criterion):
    with pytest.raises(UsageError, match="every weight in memory"):
        spp_export.plan(
            workshop.scenario,
            model=str(workshop.dense("llama-mqa")),
            artifacts=workshop.artifacts("llama-mqa"),
            keep=0.7,
            answer_tokens=0,
            criterion=criterion,
            layerwise=True,
        )


def test_what_is_planned_on_is_what_the_plan_says(workshop, tmp_path, monkeypatch):
    """A model on disk answers nothing: answers of pools count neither then nor at the re-fit."""
    artifacts = tmp_path / "artifacts"
    model = str(workshop.dense("llama-mqa"))
    spp_export.probe(workshop.pools, artifacts, model=model, answer_tokens=4)
    read = []
    parts = planner.calibration_parts

    def seen(*arguments, answered):
        read.append(answered)
        return parts(*arguments, answered=answered)

    monkeypatch.setattr(planner, "calibration_parts", seen)
    for layerwise in (False, True):
        result = spp_export.plan(
            workshop.scenario, model=model, artifacts=artifacts, layerwise=layerwise
        )
        assert read.pop() == (result.plan.calibration["answer_tokens"] > 0) == (not layerwise)

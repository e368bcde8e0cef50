"""Dry runs, and what is refused before anything is made."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
from exporting import CASE, refused, write_plan, write_texts
from factories import random_layers, read_config, shape_of

import spp_export
from spp_export.common.errors import ArtifactsError, ModelError, PlanError, UsageError
from spp_export.common.progress import show_progress

NAME = "llama-gqa-bias"


@pytest.fixture
def dense(workshop) -> Path:
    return workshop.dense(NAME)


@pytest.mark.parametrize("compensate", ["none", "lstsq"])
def test_a_dry_run_writes_nothing(workshop, tmp_path, monkeypatch, compensate):
    workshop.artifacts(NAME)
    monkeypatch.chdir(tmp_path)
    request = {"dry_run": True}
    for target in (tmp_path / "slim", None):
        result = workshop.export(NAME, target, **request, compensate=compensate)
        assert result.path is None
        assert result.report is None
    assert list(tmp_path.iterdir()) == []
    made = workshop.exported(NAME, "per-layer", compensate).result
    assert result.plan == made.plan
    listed = json.loads(json.dumps(result.to_dict()))["tensors"]
    assert [entry["name"] for entry in listed] == [entry["name"] for entry in made.tensors]


def test_a_dry_run_refuses_what_cannot_be_stored(workshop, tmp_path):
    """The answer of a dry run and that of the run must be one."""
    request = {"dry_run": True}
    asked = {"layout": "uniform", "compensate": "bias"}
    with refused(PlanError, "has no bias on its output projection"):
        workshop.export("mistral-gqa", tmp_path / "slim", **request, **asked)
    with refused(PlanError, "has no bias on its output projection"):
        workshop.plan("mistral-gqa", **asked)


def test_what_is_missing_is_named(workshop, tmp_path, dense):
    plan = write_plan(tmp_path / "my.json", dense, random_layers(shape_of(dense), 0))
    with refused(UsageError, "export needs --scenario FILE or --plan FILE"):
        spp_export.export(output=tmp_path / "slim", model=str(dense))
    with refused(UsageError, "-o is missing"):
        spp_export.export(model=str(dense), plan=plan)
    with refused(UsageError, "--artifacts is missing"):
        spp_export.export(workshop.scenario, tmp_path / "slim", model=str(dense))
    with refused(UsageError, "--dtype int8: expected one of float32"):
        spp_export.export(output=tmp_path / "slim", model=str(dense), plan=plan, dtype="int8")
    with refused(ArtifactsError, "made for the model"):
        spp_export.export(
            workshop.scenario,
            tmp_path / "slim",
            model=str(dense),
            artifacts=workshop.artifacts("llama-mqa"),
        )
    assert not (tmp_path / "slim").exists()


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"layout": "square"}, "--layout square: expected one of uniform, per-layer, ragged"),
        ({"criterion": "best"}, "--criterion best: expected one of energy, axis, taylor, .*, obs"),
        ({"units": "layers"}, "--units layers: expected one of heads, channels, both"),
        ({"comparable": "fair"}, "--comparable fair: expected one of standardised, .*, stream"),
        ({"comparable": "share"}, "--comparable: obs weighs losses in one currency"),
        ({"shrinkage": 1.5}, "--shrinkage 1.5: expected a number from 0 to 1, such as 0.5"),
        ({"width_multiple": 0}, "--width-multiple 0: expected a whole number of 1 or more"),
        ({"policy": "greedy"}, "--policy greedy: expected one of exact, published"),
        ({"compensate": "lora"}, "--compensate lora: expected one of none, bias, lstsq"),
        ({"keep": 0.5, "strength": 0.5}, "exactly one of keep, .*, got keep and strength"),
        ({"keep": 1.5}, "--keep 1.5: expected a share between 0 and 1, such as 0.8"),
        ({"regime": "dreamt"}, "regime 'dreamt' is not in these artifacts"),
    ],
)
def test_words_and_budgets_that_mean_nothing(workshop, tmp_path, asked, match):
    request = {**asked}
    with refused(UsageError, match):
        spp_export.export(
            workshop.scenario,
            tmp_path / "slim",
            model=str(workshop.dense(NAME)),
            artifacts=workshop.artifacts(NAME),
            **request,
        )
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_tokenizer_is_one_line(workshop, tmp_path):
    dense = CASE[NAME].make(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (dense / name).unlink()
    with refused(ModelError, "dense: no tokenizer that transformers can load"):
        spp_export.export(
            workshop.scenario,
            tmp_path / "slim",
            model=str(dense),
            artifacts=workshop.artifacts(NAME),
        )
    assert not (tmp_path / "slim").exists()


def test_progress_reaches_its_end(workshop, tmp_path):
    """Every bar that is drawn is drawn full."""
    seen: list[tuple[str, float | None, list[float]]] = []

    @contextmanager
    def progress(description, total):
        steps: list[float] = []
        seen.append((description, total, steps))
        yield steps.append

    with show_progress(progress):
        spp_export.export(
            workshop.scenario,
            tmp_path / "slim",
            model=str(workshop.dense(NAME)),
            artifacts=workshop.artifacts(NAME),
        )
    named = {"diagnosing the scenario", "weighing heads", "slicing", "measuring quality"}
    assert named <= {description for description, _, _ in seen}
    for description, total, steps in seen:
        if total is not None:
            assert steps == sorted(steps), description
            assert steps[-1] == total, description


def test_a_scenario_of_one_short_prompt_is_enough(workshop, tmp_path):
    path = write_texts(tmp_path / "x.txt", ["x"])
    result = spp_export.export(
        path,
        tmp_path / "slim",
        model=str(workshop.dense(NAME)),
        artifacts=workshop.artifacts(NAME),
    )
    assert result.report["passed"]
    assert result.report["quality"] is None
    assert read_config(tmp_path / "slim")["model_type"] == "spp_llama"

"""Given plans, dry runs, targets, and answers that are no: what is published, and what is not."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from exporting import CASE, load, logits, masked, tokens, tree, write_texts
from factories import random_layers, read_config, shape_of

import spp_export
import spp_export.checkpoint.slim as slim_module
from spp_export import ExportRequest, PlanRequest
from spp_export.checkpoint.source import open_source
from spp_export.errors import (
    ArtifactsError,
    CheckFailed,
    ModelError,
    OutputError,
    ParityError,
    PlanError,
    QualityError,
    SppError,
    UsageError,
)

NAME = "llama-gqa-bias"


def write_plan(path: Path, dense: Path, layers, **changes) -> Path:
    """A plan as one would write it by hand: nothing that is not needed."""
    document = {
        "schema_version": 1,
        "model": {"fingerprint": open_source(dense).fingerprint, "source": "my-model"},
        "layout": "per-layer",
        "compensation": "none",
        "layers": [
            {"kv_heads": list(layer.kv_heads), "query_heads": list(layer.query_heads)}
            | ({} if layer.channels is None else {"channels": list(layer.channels)})
            for layer in layers
        ],
    }
    path.write_text(json.dumps(document | changes))
    return path


def refused(error: type[SppError], match: str):
    """The error, in one line."""

    @contextmanager
    def context():
        with pytest.raises(error, match=match) as caught:
            yield caught
        assert "\n" not in str(caught.value)

    return context()


@pytest.fixture
def dense(workshop) -> Path:
    return workshop.dense(NAME)


# --- given plans


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
    assert '"my-model"' in (tmp_path / "slim" / "README.md").read_text()
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
    with refused(UsageError, "leave out the options of 'spp plan'"):
        spp_export.export(
            output=tmp_path / "slim",
            model=str(dense),
            plan=path,
            plan_request=PlanRequest(keep=0.5),
        )


# --- dry runs, and what is missing


@pytest.mark.parametrize("compensate", ["none", "lstsq"])
def test_a_dry_run_writes_nothing(workshop, tmp_path, monkeypatch, compensate):
    workshop.artifacts(NAME)
    monkeypatch.chdir(tmp_path)
    request = ExportRequest(dry_run=True)
    for target in (tmp_path / "slim", None):
        result = workshop.export(NAME, target, request=request, compensate=compensate)
        assert result.path is None
        assert result.report is None
    assert list(tmp_path.iterdir()) == []
    made = workshop.exported(NAME, "per-layer", compensate).result
    assert result.plan == made.plan
    listed = json.loads(json.dumps(result.to_dict()))["tensors"]
    assert [entry["name"] for entry in listed] == [entry["name"] for entry in made.tensors]


def test_a_dry_run_refuses_what_cannot_be_stored(workshop, tmp_path):
    """The answer of a dry run and that of the run must be one."""
    request = ExportRequest(dry_run=True)
    with refused(PlanError, "has no bias on its output projection"):
        workshop.export("mistral-gqa", tmp_path / "slim", request=request, compensate="bias")
    with refused(PlanError, "has no bias on its output projection"):
        workshop.plan("mistral-gqa", compensate="bias")


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
        ({"layout": "ragged"}, "--layout ragged: expected one of uniform, per-layer"),
        ({"criterion": "magnitude"}, "--criterion magnitude: expected one of energy, axis, obs"),
        ({"policy": "greedy"}, "--policy greedy: expected one of exact, published"),
        ({"compensate": "lora"}, "--compensate lora: expected one of none, bias, lstsq"),
        ({"keep": 0.5, "strength": 0.5}, "exactly one of keep, .*, got keep and strength"),
        ({"keep": 1.5}, r"keep must be a number in \(0, 1\], got 1.5"),
        ({"regime": "dreamt"}, "regime 'dreamt' is not in these artifacts"),
    ],
)
def test_words_and_budgets_that_mean_nothing(workshop, tmp_path, asked, match):
    request = PlanRequest(**asked)
    with refused(UsageError, match):
        spp_export.export(
            workshop.scenario,
            tmp_path / "slim",
            model=str(workshop.dense(NAME)),
            artifacts=workshop.artifacts(NAME),
            plan_request=request,
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


# --- targets


def test_an_existing_directory_is_left_alone(workshop, tmp_path):
    target = tmp_path / "slim"
    target.mkdir()
    (target / "thesis.txt").write_text("mine")
    with refused(OutputError, "slim: is not empty"):  # before the model is looked for
        spp_export.export(workshop.scenario, target, model=str(tmp_path / "none"))
    with refused(OutputError, "slim: is not empty"):
        workshop.export(NAME, target)
    with refused(OutputError, "has no manifest.json of spp"):
        workshop.export(NAME, target, request=ExportRequest(force=True))
    assert tree(target) == {"thesis.txt": b"mine"}
    assert list(tmp_path.iterdir()) == [target]


def test_force_replaces_an_export_of_ours_whole(workshop, tmp_path):
    target = tmp_path / "slim"
    workshop.export(NAME, target, compensate="none")
    older = tree(target)
    with refused(OutputError, "or use --force"):
        workshop.export(NAME, target, layout="uniform")
    assert tree(target) == older
    workshop.export(NAME, target, request=ExportRequest(force=True), layout="uniform")
    workshop.export(NAME, tmp_path / "fresh" / "slim", layout="uniform")
    assert tree(target) == tree(tmp_path / "fresh" / "slim")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "slim"]


def test_the_source_is_never_replaced(workshop, tmp_path):
    dense = shutil.copytree(workshop.dense(NAME), tmp_path / "dense")
    before = tree(dense)
    for force in (False, True):
        with refused(OutputError, "is not empty|has no manifest.json of spp"):
            spp_export.export(
                workshop.scenario,
                dense,
                model=str(dense),
                artifacts=workshop.artifacts(NAME),
                request=ExportRequest(force=force),
            )
    assert tree(dense) == before


# --- answers that are no


def roll(rows: np.ndarray, step: int) -> np.ndarray:
    """o_proj's columns, each one to the right."""
    return np.roll(rows, 1, axis=1)


def swap(rows: np.ndarray, step: int) -> np.ndarray:
    """q_proj's heads in reverse order."""
    return rows.reshape(-1, step, rows.shape[1])[::-1].reshape(rows.shape)


@pytest.fixture
def broken(monkeypatch):
    """Make the slicer wrong about one tensor."""

    def break_it(name: str, wrong) -> None:
        right = slim_module.slice_rows

        def slice_rows(rows, spec, units, first_row):
            found = right(rows, spec, units, first_row)
            return np.ascontiguousarray(wrong(found, spec.step)) if spec.name == name else found

        monkeypatch.setattr(slim_module, "slice_rows", slice_rows)

    return break_it


WRONG = {
    "o_proj": ("model.layers.1.self_attn.o_proj.weight", roll),
    "q_proj": ("model.layers.1.self_attn.q_proj.weight", swap),
}


@pytest.mark.parametrize("which", WRONG)
@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
@pytest.mark.parametrize("name", [NAME, "mistral-gqa", "qwen2-mha-window", "qwen3-gqa-tied"])
def test_a_wrong_slice_is_not_published(workshop, tmp_path, broken, name, layout, which):
    workshop.artifacts(name)
    broken(*WRONG[which])
    target = tmp_path / "made" / "slim"
    with refused(ParityError, "logits parity with the masked dense model: found .*, at most") as no:
        workshop.export(name, target, layout=layout, compensate="none")
    assert no.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_an_older_export_survives_a_failed_one(workshop, tmp_path, broken):
    target = tmp_path / "slim"
    workshop.export(NAME, target, compensate="none")
    older = tree(target)
    broken(*WRONG["o_proj"])
    with pytest.raises(ParityError):
        workshop.export(NAME, target, request=ExportRequest(force=True), compensate="none")
    assert tree(target) == older
    assert list(tmp_path.iterdir()) == [target]


def test_keep_failed_publishes_and_still_fails(workshop, tmp_path, broken):
    broken(*WRONG["q_proj"])
    target = tmp_path / "slim"
    with refused(CheckFailed, "Published all the same, by --keep-failed: .*slim") as caught:
        workshop.export(NAME, target, request=ExportRequest(keep_failed=True), compensate="none")
    assert type(caught.value) is ParityError
    assert caught.value.exit_code == 1
    report = json.loads((target / "verify.json").read_text())
    assert report["passed"] is False
    assert "logits parity with the masked dense model: FAILED" in (target / "README.md").read_text()
    assert not spp_export.verify(target, model=str(workshop.dense(NAME))).passed
    integrity, *_ = spp_export.verify(target, model=str(workshop.dense(NAME))).checks
    assert integrity.passed


def test_unverified_is_published_and_says_so(workshop, tmp_path, broken):
    broken(*WRONG["o_proj"])
    target = tmp_path / "slim"
    result = workshop.export(NAME, target, request=ExportRequest(verify=False), compensate="none")
    assert result.report is None
    assert not (target / "verify.json").exists()
    assert "Not verified (`--no-verify`)." in (target / "README.md").read_text()
    assert not spp_export.verify(target, model=str(workshop.dense(NAME))).passed


def test_the_quality_gate(workshop, tmp_path):
    ratio = workshop.exported(NAME, "per-layer", "none").result.report["quality"]["ratio"]
    assert ratio > 0.5
    target = tmp_path / "made" / "slim"
    with refused(QualityError, r"perplexity is .*x dense, the gate allows 0.5x. Keep more") as no:
        workshop.export(
            NAME, target, request=ExportRequest(max_perplexity_ratio=0.5), compensate="none"
        )
    assert no.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []
    result = workshop.export(
        NAME, target, request=ExportRequest(max_perplexity_ratio=ratio + 0.01), compensate="none"
    )
    assert result.path == target


def test_a_failed_gate_can_be_kept(workshop, tmp_path):
    request = ExportRequest(max_perplexity_ratio=0.5, keep_failed=True)
    with refused(QualityError, "Published all the same"):
        workshop.export(NAME, tmp_path / "slim", request=request, compensate="none")
    assert spp_export.verify(tmp_path / "slim", model=str(workshop.dense(NAME))).passed


def test_a_gate_needs_held_out_text_and_the_checks(workshop, tmp_path):
    short = write_texts(tmp_path / "short.txt", ["1 + 1", "2 + 2", "3 + 3"])

    def export(**asked) -> None:
        spp_export.export(
            short,
            tmp_path / "slim",
            model=str(workshop.dense(NAME)),
            artifacts=workshop.artifacts(NAME),
            request=ExportRequest(max_perplexity_ratio=9.0, **asked),
        )

    with refused(QualityError, "a scenario of at least four prompts"):
        export()
    for asked in ({"verify": False}, {"dry_run": True}):
        with refused(UsageError, "--max-perplexity needs the checks"):
            export(**asked)
    assert list(tmp_path.iterdir()) == [short]


@pytest.mark.parametrize("stage", ["slicing", "checking against the masked dense model"])
def test_an_interrupt_leaves_nothing(workshop, tmp_path, stage):
    @contextmanager
    def interrupted(description, total):
        if description == stage:
            raise KeyboardInterrupt
        yield lambda done: None

    with pytest.raises(KeyboardInterrupt):
        spp_export.export(
            workshop.scenario,
            tmp_path / "made" / "slim",
            model=str(workshop.dense(NAME)),
            artifacts=workshop.artifacts(NAME),
            progress=interrupted,
        )
    assert list(tmp_path.iterdir()) == []


def test_progress_reaches_its_end(workshop, tmp_path):
    """Every bar that is drawn is drawn full."""
    seen: dict[str, tuple[float | None, list[float]]] = {}

    @contextmanager
    def progress(description, total):
        steps = seen.setdefault(description, (total, []))[1]
        yield steps.append

    spp_export.export(
        workshop.scenario,
        tmp_path / "slim",
        model=str(workshop.dense(NAME)),
        artifacts=workshop.artifacts(NAME),
        progress=progress,
    )
    assert {"diagnosing the scenario", "weighing heads", "slicing", "measuring quality"} <= set(
        seen
    )
    for description, (total, steps) in seen.items():
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

"""Answers that are no: nothing is published unless it is asked for."""

from __future__ import annotations

import json

import numpy as np
import pytest
from exporting import refused, tree, write_texts

import spp_export
import spp_export.slicing.compensation as compensation_module
import spp_export.slicing.weights as slim_module
from spp_export.common.errors import CheckFailed, ParityError, QualityError, UsageError

pytestmark = pytest.mark.thinned(most=4)

NAME = "llama-gqa-bias"


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


@pytest.mark.parametrize("name", [NAME, "qwen2-mha-window"])
def test_a_wrong_refit_is_not_published(workshop, tmp_path, monkeypatch, name):
    """The oracle takes re-fitted projections as written, so parity alone would not see it."""
    workshop.artifacts(name)
    right = compensation_module.refit_blocks
    monkeypatch.setattr(
        compensation_module, "refit_blocks", lambda *a: np.roll(right(*a), 1, axis=1)
    )
    with refused(ParityError, "re-fitted projections against plain slices: "):
        workshop.export(name, tmp_path / "slim", compensate="lstsq")
    assert list(tmp_path.iterdir()) == []


def test_an_older_export_survives_a_failed_one(workshop, tmp_path, broken):
    target = tmp_path / "slim"
    workshop.export(NAME, target, compensate="none")
    older = tree(target)
    broken(*WRONG["o_proj"])
    with pytest.raises(ParityError):
        workshop.export(NAME, target, force=True, compensate="none")
    assert tree(target) == older
    assert list(tmp_path.iterdir()) == [target]


def test_keep_failed_publishes_and_still_fails(workshop, tmp_path, broken):
    broken(*WRONG["q_proj"])
    target = tmp_path / "slim"
    with refused(CheckFailed, "Published all the same, by --keep-failed: .*slim") as caught:
        workshop.export(NAME, target, keep_failed=True, compensate="none")
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
    result = workshop.export(NAME, target, verify=False, compensate="none")
    assert result.report is None
    assert not (target / "verify.json").exists()
    assert "Not verified (`--no-verify`)." in (target / "README.md").read_text()
    assert not spp_export.verify(target, model=str(workshop.dense(NAME))).passed


def test_the_quality_gate(workshop, tmp_path):
    ratio = workshop.exported(NAME, "per-layer", "none").result.report["quality"]["ratio"]
    assert ratio > 0.5
    target = tmp_path / "made" / "slim"
    with refused(QualityError, r"perplexity is .*x dense, the gate allows 0.5x. Keep more") as no:
        workshop.export(NAME, target, max_perplexity=0.5, compensate="none")
    assert no.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []
    result = workshop.export(NAME, target, max_perplexity=ratio + 0.01, compensate="none")
    assert result.path == target


def test_a_failed_gate_can_be_kept(workshop, tmp_path):
    request = {"max_perplexity": 0.5, "keep_failed": True}
    with refused(QualityError, "Published all the same"):
        workshop.export(NAME, tmp_path / "slim", **request, compensate="none")
    assert spp_export.verify(tmp_path / "slim", model=str(workshop.dense(NAME))).passed


def test_a_gate_needs_held_out_text_and_the_checks(workshop, tmp_path):
    short = write_texts(tmp_path / "short.txt", ["1 + 1", "2 + 2", "3 + 3"])

    def export(**asked) -> None:
        spp_export.export(
            short,
            tmp_path / "slim",
            model=str(workshop.dense(NAME)),
            artifacts=workshop.artifacts(NAME),
            max_perplexity=9.0,
            **asked,
        )

    with refused(UsageError, "--max-perplexity: needs held-out text, a scenario of at least 4"):
        export()
    for asked in ({"verify": False}, {"dry_run": True}):
        with refused(UsageError, "--max-perplexity: nothing is measured then"):
            export(**asked)
    assert list(tmp_path.iterdir()) == [short]

"""The measured table of families: what is committed, and what the command does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import measure
import pytest
from old_transformers import since_5

from spp_export.evaluation.contract import LIMIT
from spp_export.models.families import known_types

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "families-cpu.json"


def committed() -> Any:
    """The document of the last run."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def test_every_family_was_measured_and_holds() -> None:
    rows = committed()["rows"]
    assert sorted(row["family"] for row in rows) == known_types(), "run make families"
    assert len(rows) >= 60
    for row in rows:
        assert "failed" not in row
        assert all(row[key] <= LIMIT for key in measure.DISTANCES)
        assert row["plans"] >= row["forms"] >= 1
        assert row["parameters_kept"] < 1


def test_the_page_is_that_of_the_document() -> None:
    page = (ROOT / "docs" / "exactness.md").read_text(encoding="utf-8")
    assert page == measure.page(committed()), "run make families"


@since_5("other rows are of families that it does not have")
def test_named_families_are_measured_anew_and_others_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not hold is named, and ends the command with status 1."""
    files = [f"--json={tmp_path / 'rows.json'}", f"--page={tmp_path / 'page.md'}"]
    assert measure.main(["opt", *files]) == 0
    (before,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert (before["forms"], before["plans"]) == (3, 6)
    assert before["query heads"].endswith(" of 48")
    monkeypatch.setattr(measure, "LIMIT", 0.0)
    assert measure.main(["llama", *files]) == 1
    assert "llama: a difference above 0" in capsys.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert rows[1] == before
    assert rows[0]["failed"] == "a difference above 0"
    assert "2 families, of which 1 hold" in (tmp_path / "page.md").read_text()


def test_an_unknown_family_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        measure.main(["xlnet"])
    assert "no tiny model of xlnet" in capsys.readouterr().err

"""The campaign that looks for better plans by the true KL, on a tiny model."""

from __future__ import annotations

import json

import pytest

import spp_export
from spp_campaigns.plan_search import main


def test_moves_that_stay_bring_the_model_nearer_on_the_text_they_are_chosen_by(workshop, tmp_path):
    """And the plan it begins with is the one that `spp plan` makes, as an export of it measures."""
    model, artifacts = str(workshop.dense("llama-gqa-bias")), tmp_path / "artifacts"
    spp_export.probe(workshop.pools, artifacts, model=model, answer_tokens=4)
    target, text = tmp_path / "search.json", str(workshop.scenario)
    asked = ["--model", model, "--artifacts", str(artifacts), "--json", str(target)]
    main([*asked, "--scenario", text, "--other", text, "--moves", "12"])
    rows = json.loads(target.read_text())["rows"]
    assert [row["units"] for row in rows] == ["heads", "both"]
    for row in rows:
        before, after = row["before"], row["after"]
        assert (after["calibration"] < before["calibration"]) == (row["kept"] > 0)
        assert before["own"] == before["other"], "the same text"
        options = {"model": model, "artifacts": artifacts, "units": row["units"]}
        options |= {"criterion": "fisher", "keep": 0.8}
        made = spp_export.export(text, tmp_path / row["units"], **options)
        assert made.report["quality"]["mean_kl"] == pytest.approx(before["own"]["kl"], abs=2e-3)

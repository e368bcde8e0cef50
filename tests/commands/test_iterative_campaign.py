"""The campaign that removes in several steps, on a tiny model."""

from __future__ import annotations

import json

import pytest

import spp_export
from spp_campaigns.iterative_removal import main


def test_one_step_is_an_export_and_more_begin_where_the_last_ended(workshop, tmp_path):
    model, artifacts = str(workshop.dense("llama-gqa-bias")), tmp_path / "artifacts"
    spp_export.probe(workshop.pools, artifacts, model=model, answer_tokens=4)
    target, text = tmp_path / "steps.json", str(workshop.scenario)
    asked = ["--model", model, "--artifacts", str(artifacts), "--json", str(target)]
    main([*asked, "--scenario", text, "--other", text, "--steps", "1", "--steps", "2"])
    rows = json.loads(target.read_text())["rows"]
    assert [(row["units"], row["steps"]) for row in rows] == [
        ("heads", 1),
        ("heads", 2),
        ("both", 1),
        ("both", 2),
    ]
    for once, twice in (rows[:2], rows[2:]):
        options = {"model": model, "artifacts": artifacts, "units": once["units"]}
        options |= {"criterion": "fisher", "keep": 0.8}
        made = spp_export.export(text, tmp_path / once["units"], **options)
        assert made.report["quality"]["mean_kl"] == pytest.approx(once["own"]["kl"], abs=2e-3)
        assert twice["own"] != once["own"]
        assert once["own"] == once["other"], "the same text"

"""The campaign that other ways of planning are compared by, on a tiny model."""

from __future__ import annotations

import json

import spp_export
from spp_campaigns.choices import _LAYOUTS, _MIXTURES, _WIDTHS, main


def test_every_way_is_judged_on_both_scenarios(workshop, tmp_path, monkeypatch):
    model, artifacts = str(workshop.dense("llama-gqa-bias")), tmp_path / "artifacts"
    spp_export.probe(workshop.pools, artifacts, model=model, answer_tokens=4)
    monkeypatch.setattr("spp_campaigns.choices.UNITS", ("both",))
    target = tmp_path / "choices.json"
    text = str(workshop.scenario)
    asked = ["--model", model, "--artifacts", str(artifacts), "--json", str(target)]
    main([*asked, "--scenario", text, "--other", text, "--size", "0.7", "--size", "1"])
    rows = json.loads(target.read_text())["rows"]
    assert len(rows) == 4 + len(_MIXTURES) + len(_LAYOUTS) + len(_WIDTHS)
    assert {row["layout"] for row in rows} == {"per-layer", *_LAYOUTS}
    assert {row["width_multiple"] for row in rows} > set(_WIDTHS)
    assert all(row["own"] == row["other"] for row in rows), "the same text"
    whole = [row["own"] for row in rows if row["keep"] == 1]
    assert [row["kl"] for row in whole] == [0, 0]
    assert all(row["own"]["kl"] > 0 for row in rows if row["keep"] < 1)

"""The campaign that judges an export on prompts it has never seen, on a tiny model."""

from __future__ import annotations

import json

import pytest
from exporting import texts, write_texts

from spp_campaigns.other_prompts import compared, main
from spp_export.calibration.reading import dialogue_text
from spp_export.evaluation.quality import measure_quality
from spp_export.models.loader import load_dense

NAME = "llama-gqa-bias"


def test_the_row_of_a_scenario(workshop, tmp_path):
    prompts = write_texts(tmp_path / "prompts.txt", texts("capitals", 16, 5))
    target = tmp_path / "other.json"
    model = str(workshop.dense(NAME))
    asked = ["--model", model, "--artifacts", str(workshop.artifacts(NAME)), "--units", "both"]
    asked += ["--scenario", str(prompts), "--keep", "0.7", "--tokens", "8"]
    status = main([*asked, "--json", str(target), "--dir", str(tmp_path)])
    (row,) = json.loads(target.read_text())["rows"]
    assert (row["prompts"], row["other_prompts"], row["foretold"]["answers"]) == (8, 8, 2)
    assert row["measured"]["answers"] == 8
    assert 0 < row["measured"]["tokens"] <= 8 * 8
    assert row["measured"]["mean_kl"] > 0
    assert status == (not row["within"])


def test_its_own_arithmetic_finds_what_an_export_measures(workshop):
    """The same answers of two models: sums of KL, the same likeliest tokens, and their number."""
    dense, slim = (load_dense(workshop.dense(name)) for name in (NAME, "llama-mqa"))
    rows = [([5, 9, 7, 11, 3, 8], 3), ([4, 6, 12, 10], 2)]
    found = [compared(dense, slim, *row) for row in rows]
    quality = measure_quality(dense, slim, None, [dialogue_text(*row) for row in rows])
    kl, same, count = (sum(values) for values in zip(*found, strict=True))
    assert count == quality.tokens == 5
    assert kl / count == pytest.approx(quality.mean_kl, rel=1e-5)
    assert same / count == quality.top1
    assert compared(dense, dense, *rows[0]) == (0, 3, 3)

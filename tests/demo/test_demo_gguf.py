"""The default model in llama.cpp: the greedy tokens of transformers, per-layer and uniform."""

from __future__ import annotations

from pathlib import Path

import pytest
from factories import format_options, random_layers, uniform_layers

import spp_export
from spp_campaigns.gguf_parity import compare
from spp_export import GgufOptions, Plan
from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.models.hub import locate_model

pytestmark = [pytest.mark.demo, pytest.mark.slow]


@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
def test_greedy_tokens(layout, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    place = locate_model("demo")
    source = open_source(place.path, place.name)
    layers = (
        random_layers(source.shape, 0, channels=False)
        if layout == "per-layer"
        else uniform_layers(source.shape, 0, kv_heads=2, group_size=3)
    )
    plan = Plan(source.fingerprint, source.name, layout, "none", layers)
    slim, file = tmp_path / "slim", tmp_path / "gguf"
    spp_export.export(output=slim, plan=plan, verify=False)
    spp_export.convert(slim, file, **format_options(GgufOptions()), verify=False)
    found = compare(slim, file)
    assert found["gguf"]["architecture"] == {"per-layer": "deci", "uniform": "llama"}[layout]
    assert len(found["rows"]) >= 5
    for row in found["rows"]:
        assert row["tokens"] == 32
        # Where the best two are this near, rounding decides.
        assert row["same"] or row["margin"] < 1e-3

"""Families that compute otherwise than Llama, from the command line to the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from exporting import Workshop
from factories import make_checkpoint

from spp_cli.main import run


def command(*words: object) -> None:
    assert run([str(word) for word in words]) == 0


def test_norms_over_all_heads_go_through_every_command(workshop: Workshop, tmp_path: Path) -> None:
    """Verified against the norm over the kept heads, which plan, card and report say."""
    dense = make_checkpoint(tmp_path, "olmo2", kv_heads=2, query_heads=4, layers=2)
    model = ("--model", dense)
    artifacts, out = tmp_path / "artifacts", tmp_path / "slim"
    answers = ("--answer-tokens", "0")
    command("probe", "--pools", workshop.pools, *model, *answers, "-o", artifacts)
    asked = ("--artifacts", artifacts, "--keep", "0.6", "--units", "both", *answers)
    asked = (*asked, "--width-multiple", "8", "--layout", "ragged")
    command("export", "--scenario", workshop.scenario, *model, *asked, "-o", out)
    verdict = json.loads((out / "verify.json").read_text())
    assert verdict["passed"]
    (remark,) = json.loads((out / "plan.json").read_text())["family"]["remarks"]
    assert "norms all its heads" in remark
    assert f"{remark[:1].upper()}{remark[1:]}." in (out / "README.md").read_text()
    command("verify", out, *model)
    command("report", out, "-o", tmp_path / "page.html")
    assert "norms all its heads" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("family", "units", "layout", "keep"),
    [
        ("mixtral", "experts", "per-layer", 0.7),
        ("qwen3_moe", "all", "ragged", 0.45),
        pytest.param("qwen3_moe", "experts", "uniform", 0.7, marks=pytest.mark.slow),
    ],
)
def test_whole_experts_go_through_every_command(
    family: str, units: str, layout: str, keep: float, workshop: Workshop, tmp_path: Path
) -> None:
    """Another number of them in each layer, or in the uniform layout the same."""
    sizes = {"kv_heads": 2, "query_heads": 4, "layers": 3, "num_experts_per_tok": 2}
    sizes |= {"num_experts" if family == "qwen3_moe" else "num_local_experts": 6}
    dense = make_checkpoint(tmp_path, family, moe_intermediate_size=24, **sizes)
    model, answers = ("--model", dense), ("--answer-tokens", "0")
    artifacts, out = tmp_path / "artifacts", tmp_path / "slim"
    probed = ("--units", "heads", *answers, "-o", artifacts)
    command("probe", "--pools", workshop.pools, *model, *probed)
    asked = ("--artifacts", artifacts, "--keep", keep, "--units", units, "--layout", layout)
    command("export", "--scenario", workshop.scenario, *model, *asked, *answers, "-o", out)
    assert json.loads((out / "verify.json").read_text())["passed"]
    plan = json.loads((out / "plan.json").read_text())
    counts = [len(layer.get("experts", range(6))) for layer in plan["layers"]]
    assert min(counts) >= 2
    assert sum(counts) < 18
    if units == "experts":
        assert (len(set(counts)) == 1) == (layout == "uniform")
    assert any(len(layer["query_heads"]) < 4 for layer in plan["layers"]) == (units == "all")
    realised = plan["budget"]["realised"]
    assert realised["cost"] <= realised["limit"]
    assert realised["expert_keep"] < 1
    command("verify", out, *model)
    command("report", out, "-o", tmp_path / "page.html")

"""Families that compute otherwise than Llama, from the command line to the files."""

from __future__ import annotations

import json
from pathlib import Path

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

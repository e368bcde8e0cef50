"""`spp bench` and `python -m spp_bench`: the same run, printed."""

from __future__ import annotations

import json

import pytest
from benching import make_pair, small_rates
from typer.testing import CliRunner

from spp_bench import results
from spp_bench.__main__ import main
from spp_bench.schema import check
from spp_cli.main import app

GRID = ["--context", "6", "--new-tokens", "2", "--rounds", "1", "--threads", "1", "--no-memory"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("bench"))


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    small_rates(monkeypatch)
    monkeypatch.setenv("SPP_CACHE", str(tmp_path / "cache"))
    # Of one round on a tiny model the speed-up can be anything.
    monkeypatch.setattr(results.Bound, "exceeded", lambda *_: False)


def test_the_command_prints_tables(pair, tmp_path):
    arguments = ["bench", str(pair[1]), "--model", str(pair[0]), *GRID, "-o", str(tmp_path / "r")]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.stdout
    for text in ("decode, batch 1, context 6", "dense torch", "slim torch", "efficiency"):
        assert text in shown.stdout
    check(json.loads((tmp_path / "r").read_text()))


def test_an_impossible_speedup_ends_with_status_1(pair, monkeypatch):
    monkeypatch.setattr(results.Bound, "exceeded", lambda *_: True)
    arguments = ["bench", str(pair[1]), "--model", str(pair[0]), *GRID, "--json"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 1
    document = json.loads(shown.stdout)
    assert "is above the bound" in document["problems"][0]


def test_the_module_runs_the_same(pair, capsys, tmp_path):
    plots = ["--plot", str(tmp_path / "plots")]
    assert main([str(pair[1]), "--model", str(pair[0]), *GRID, *plots]) == 0
    assert "decode, batch 1, context 6" in capsys.readouterr().out
    assert (tmp_path / "plots" / "speedup.png").exists()


def test_the_module_reports_errors_in_one_line(pair, capsys):
    assert main([str(pair[0]), "--model", str(pair[0]), *GRID]) == 2
    assert capsys.readouterr().err.count("\n") == 1

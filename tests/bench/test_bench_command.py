"""`spp bench`, printed."""

from __future__ import annotations

import json

import pytest
from benching import make_pair, small_rates
from typer.testing import CliRunner

from spp_bench import results
from spp_bench.schema import check
from spp_cli.main import app
from spp_export.common.errors import SppError

GRID = ["--context", "6", "--new-tokens", "2", "--rounds", "1", "--threads", "1", "--no-memory"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("bench"))


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    small_rates(monkeypatch)
    monkeypatch.setenv("SPP_CACHE", str(tmp_path / "cache"))


def test_the_command_prints_tables(pair, tmp_path):
    arguments = ["bench", str(pair[1]), "--model", str(pair[0]), *GRID, "-o", str(tmp_path / "r")]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.stdout
    for text in ("decode, batch 1, context 6", "dense torch", "slim torch", "efficiency"):
        assert text in shown.stdout
    check(json.loads((tmp_path / "r").read_text()))


def test_an_impossible_speedup_ends_with_status_1(pair, monkeypatch):
    monkeypatch.setattr(results.Bound, "exceeded", lambda *_: True)
    arguments = ["bench", str(pair[1]), "--model", str(pair[0]), *GRID, "--rounds", "7", "--json"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 1
    document = json.loads(shown.stdout)
    assert "is above the bound" in document["problems"][0]


def test_curves_are_drawn_where_a_directory_is_named(pair, tmp_path):
    plots = ["--plot", str(tmp_path / "plots")]
    shown = CliRunner().invoke(app, ["bench", str(pair[1]), "--model", str(pair[0]), *GRID, *plots])
    assert shown.exit_code == 0, shown.output
    assert (tmp_path / "plots" / "speedup.png").exists()


def test_a_directory_that_is_no_export_is_refused_in_one_line(pair):
    shown = CliRunner().invoke(app, ["bench", str(pair[0]), "--model", str(pair[0]), *GRID])
    assert isinstance(shown.exception, SppError)
    assert shown.exception.exit_code == 2
    assert "\n" not in str(shown.exception)

"""What `spp eval` asks the library for, and what it shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import spp_export
from spp_cli.main import app, run
from spp_export import EvalResult
from spp_export.evaluation.bootstrap import DocumentScores
from spp_export.evaluation.harness.records import Record, Results
from spp_export.evaluation.harness.rows import DENSE, Row
from spp_export.evaluation.harness.runner import summary

TEXT = "scenario, held out"
HEADER = {
    "model": {"name": "a-model"},
    "context": {},
    "scenario": {"name": "chemistry.txt"},
    "texts": {TEXT: {"documents": 30}},
    "machine": {},
    "settings": {"dtype": "float32"},
}
OBS = Row(0.8, "heads", "obs")


def record(row: Row, loss: float) -> Record:
    import numpy as np

    tokens = np.full(30, 20.0)
    dense = np.linspace(50, 70, 30)
    scores = DocumentScores(tokens, dense, dense + loss * tokens, loss * tokens, 0.9 * tokens)
    lists = {"tokens": tokens.tolist(), **scores.to_dict(), "summary": summary(scores)}
    return Record(row.label, row, {"realised": {"keep": row.keep}, "texts": {TEXT: lists}})


def result(directory: Path) -> EvalResult:
    rows = (
        record(DENSE, 0.0),
        record(OBS, 0.02),
        record(Row(0.8, "heads", "obs", text="mean", kind="control"), 0.03),
        record(Row(0.8, "heads", "random", whitelist=False, kind="control", seed=1), 0.9),
        Record("f", Row(0.8, "heads", "axis"), {"error": "the artifacts hold no axis."}),
    )
    return EvalResult(directory, Results(HEADER, rows))


@pytest.fixture
def library(monkeypatch):
    calls = {}

    def evaluate(*positional, **keywords):
        calls["evaluate"] = (positional, keywords)
        return result(positional[1])

    def evaluate_scenarios(scenarios, output, **keywords):
        calls["evaluate_scenarios"] = ((scenarios, output), keywords)
        return tuple(result(output / Path(scenario).stem) for scenario in scenarios)

    monkeypatch.setitem(vars(spp_export), "evaluate", evaluate)
    monkeypatch.setitem(vars(spp_export), "evaluate_scenarios", evaluate_scenarios)
    return calls


def invoke(*arguments):
    found = CliRunner().invoke(app, ["eval", *(str(a) for a in arguments)])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found


def test_defaults(library):
    invoke("--scenario", "s.txt", "-o", "out")
    assert library["evaluate"] == (("s.txt", Path("out")), {})


def test_every_flag_is_passed(library):
    invoke(
        *("--scenario", "s.txt", "-o", "out", "--wrong", "w.txt", "--model", "org/m"),
        *("--artifacts", "art", "--keep", "0.9", "--keep", "0.7", "--criterion", "flap"),
        *("--criterion", "all", "--units", "heads", "--units", "both", "--compensate", "bias"),
        *("--comparable", "share", "--ablations", "--other-artifacts", "plain=dir/a=b"),
        *("--plan", "p.json", "--pools", "pools", "--domain", "law", "--eval-set", "q.json"),
        *("--generate", "--max-new-tokens", "9", "--no-curves", "--device", "cuda:1"),
        *("--dtype", "bfloat16", "--seed", "3", "--force", "--quiet"),
    )
    _, keywords = library["evaluate"]
    assert keywords == {
        "wrong": Path("w.txt"),
        "model": "org/m",
        "artifacts": Path("art"),
        "keep": (0.9, 0.7),
        "criterion": ("flap", "all"),
        "units": ("heads", "both"),
        "compensate": ("bias",),
        "comparable": "share",
        "ablations": True,
        "other_artifacts": {"plain": "dir/a=b"},
        "plan": (Path("p.json"),),
        "pools": Path("pools"),
        "domain": ("law",),
        "eval_set": (Path("q.json"),),
        "generate": True,
        "max_new_tokens": 9,
        "curves": False,
        "device": "cuda:1",
        "dtype": "bfloat16",
        "seed": 3,
        "force": True,
    }


def test_several_scenarios_each_get_a_report(library):
    found = invoke("--scenario", "a.txt", "--scenario", "b.txt", "-o", "out")
    positional, keywords = library["evaluate_scenarios"]
    assert positional == (("a.txt", "b.txt"), Path("out"))
    assert keywords == {}
    assert found.stdout.index("written to out/a") < found.stdout.index("written to out/b")
    found = invoke("--scenario", "a.txt", "--scenario", "b.txt", "-o", "out", "--json")
    assert [each["output"] for each in json.loads(found.stdout)["evaluations"]] == [
        "out/a",
        "out/b",
    ]


def test_the_report(library):
    found = invoke("--scenario", "s.txt", "-o", "out")
    lines = found.stdout.splitlines()
    assert "beside dense, scenario, held out" in lines[0]
    ranked = [line.split()[:2] for line in lines if line.strip()[:2] in ("1 ", "2 ", "3 ")]
    assert ranked == [["1", "dense"], ["1", "obs"], ["2", "obs,"], ["3", "random,"]]
    assert "obs / obs, domain mean" in found.stdout
    assert "better" in found.stdout
    assert "axis, keep 0.8: the artifacts hold no axis." in found.stdout
    assert "written to out" in lines[-1]
    assert "--wrong FILE" in found.stderr
    assert max(map(len, lines)) <= 100


def test_json_is_one_object_without_documents(library):
    found = json.loads(invoke("--scenario", "s.txt", "-o", "out", "--json").stdout)
    assert [row["label"] for row in found["rows"]][:2] == ["dense", "obs"]
    assert found["failed"][0]["error"] == "the artifacts hold no axis."
    assert found["output"] == "out"
    assert "nll" not in json.dumps(found)


def test_quiet_says_where(library):
    found = invoke("--scenario", "s.txt", "-o", "out", "--quiet", "--wrong", "w.txt")
    assert (found.stdout, found.stderr) == ("out\n", "")


@pytest.mark.parametrize("value", ["plain", "=dir", "plain="])
def test_other_artifacts_need_a_name_and_a_directory(library, capsys, value):
    assert run(["eval", "--scenario", "s.txt", "-o", "out", "--other-artifacts", value]) == 2
    assert "expected NAME=PATH" in capsys.readouterr().err


def test_unknown_names_are_one_line(capsys, tmp_path):
    arguments = ["eval", "--scenario", "s.txt", "-o", str(tmp_path / "o"), "--criterion", "best"]
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --criterion best: expected one of energy")
    assert error.count("\n") == 1

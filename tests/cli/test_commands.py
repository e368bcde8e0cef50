"""What each command asks the library for, with the library replaced by recorders."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
from cli_results import diagnosis, export_result, plan_result
from typer.testing import CliRunner

import spp_export
from spp_cli.main import app, explain
from spp_export.commands.show import Shown
from spp_export.common.errors import BudgetError, ParityError, ProfileError, UsageError


class Report:
    """As much of a VerifyReport as the command looks at; the real one needs torch."""

    def __init__(self, *failures):
        self.failures = failures
        self.passed = not failures

    def to_dict(self):
        checks = [{"name": "parity", "passed": self.passed, "detail": "4 tokens"}]
        return {"schema_version": 1, "passed": self.passed, "checks": checks}


class Failure:
    name = "parity"

    def describe(self):
        return "found 3, at most 1."


@pytest.fixture
def library(monkeypatch):
    """Arguments of calls by function name; answers can be replaced."""
    calls = {}
    answers = {
        "export": export_result(),
        "plan": plan_result(),
        "diagnose": diagnosis(),
        "verify": Report(),
        "probe": None,
        "import_artifacts": None,
        "show": Shown("artifacts", {"layers": 30}, ()),
    }

    def recorder(name):
        signature = inspect.signature(getattr(spp_export, name))

        def call(*positional, **keywords):
            calls[name] = signature.bind(*positional, **keywords).arguments
            return answers[name]

        return call

    for name in answers:
        monkeypatch.setitem(vars(spp_export), name, recorder(name))
    calls["answers"] = answers
    return calls


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_plan_passes_every_flag(library):
    result = invoke(
        *("plan", "--scenario", "s.txt", "--model", "org/m", "--artifacts", "art"),
        *("--layout", "uniform", "--criterion", "axis", "--policy", "exact", "--compensate"),
        *("bias", "--regime", "cross-domain", "--keep", "0.5", "--device", "cuda:1"),
        *("--dtype", "bfloat16", "--layerwise", "--tp", "2"),
    )
    assert result.exit_code == 0
    assert library["plan"] == {
        "scenario": "s.txt",
        "model": "org/m",
        "artifacts": Path("art"),
        "keep": 0.5,
        "layout": "uniform",
        "criterion": "axis",
        "compensate": "bias",
        "regime": "cross-domain",
        "tp": 2,
        "device": "cuda:1",
        "dtype": "bfloat16",
        "layerwise": True,
    }


def test_the_defaults_are_the_librarys(library):
    assert invoke("plan", "--scenario", "-").exit_code == 0
    assert library["plan"] == {"scenario": "-"}
    assert invoke("export", "--scenario", "s.txt").exit_code == 0
    assert library["export"] == {"scenario": "s.txt"}


@pytest.mark.parametrize(
    ("flag", "text", "field", "value"),
    [
        ("--max-params", "120M", "max_params", 120_000_000),
        ("--max-params", "1.5G", "max_params", 1_500_000_000),
        ("--max-kv-bytes", "12k", "max_kv_bytes", 12_000),
        ("--max-kv-bytes", "30Ki", "max_kv_bytes", 30_720),
        ("--strength", "0.7", "strength", 0.7),
        ("--cost", "kv-bytes", "cost", "kv-bytes"),
    ],
)
def test_budgets(library, flag, text, field, value):
    invoke("plan", "--scenario", "s.txt", flag, text)
    assert library["plan"] == {"scenario": "s.txt", field: value}


def test_a_budget_of_time(library, tmp_path, monkeypatch):
    flags = ("--profile", tmp_path / "none.json", "--max-latency", "3.5")
    with pytest.raises(UsageError, match="go together"):
        invoke("plan", "--scenario", "s.txt", *flags[:2])
    with pytest.raises(ProfileError, match=r"none\.json"):
        invoke("plan", "--scenario", "s.txt", "--cost", "latency", *flags)
    monkeypatch.setattr("spp_export.planning.latency.read_latency_table", lambda path: None)
    invoke("plan", "--scenario", "s.txt", "--cost", "latency", *flags)
    profile = {"profile": tmp_path / "none.json", "max_latency": 3.5}
    assert library["plan"] == {"scenario": "s.txt", "cost": "latency", **profile}


def test_export_passes_its_own_flags(library):
    result = invoke(
        *("export", "--scenario", "s.txt", "-o", "out/x", "--max-perplexity", "1.04", "--seed"),
        *("7", "--keep-failed", "--force"),
    )
    assert result.exit_code == 0
    assert library["export"] == {
        "scenario": "s.txt",
        "output": Path("out/x"),
        "force": True,
        "keep_failed": True,
        "max_perplexity": 1.04,
        "seed": 7,
    }


def test_export_of_a_plan_and_without_checks(library):
    invoke("export", "--plan", "plan.json", "-o", "out/x", "--no-verify", "--dry-run")
    assert library["export"] == {
        "output": Path("out/x"),
        "plan": Path("plan.json"),
        "verify": False,
        "dry_run": True,
    }


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--format", "gguf", "--quant", "int8", "--scenario", "s"], "--format gguf has q8_0"),
        (["--plan", "p", "--max-params", "5M"], "--max-params: the plan already decides that"),
        (["--plan", "p", "--compensate", "none"], "--compensate: the plan already decides that"),
        (["--scenario", "s", "--max-perplexity", "1.1", "--no-verify"], "nothing is measured then"),
        (["--scenario", "s", "--max-perplexity", "0"], "expected a ratio above 0, such as 1.05"),
    ],
)
def test_what_export_refuses(library, arguments, complaint):
    with pytest.raises(UsageError, match=complaint):
        invoke("export", *arguments)
    assert "export" not in library


def test_diagnose(library):
    result = invoke(
        "diagnose", "--scenario", "s.txt", "--regime", "in-domain", "--layers", "--json"
    )
    assert library["diagnose"] == {"scenario": "s.txt", "regime": "in-domain"}
    assert json.loads(result.stdout) == diagnosis().to_dict(layers=True)


def test_verify(library):
    result = invoke("verify", "out/x", "--model", "dense", "--scenario", "s.txt", "--seed", "3")
    assert library["verify"] == {
        "out": Path("out/x"),
        "model": "dense",
        "scenario": "s.txt",
        "seed": 3,
    }
    assert result.exit_code == 0
    assert result.stdout == "ok  parity  4 tokens\n"


def test_a_failed_verify_exits_with_1(library):
    library["answers"]["verify"] = Report(Failure())
    result = invoke("verify", "out/x")
    assert result.exit_code == 1
    assert result.stdout == "FAILED  parity  4 tokens\n"
    assert result.stderr == "error: parity: found 3, at most 1.\n"
    result = invoke("verify", "out/x", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == Report(Failure()).to_dict()


def test_probe_and_import(library):
    result = invoke("probe", "--pools", "pools", "-o", "art", "--domains", "math, history")
    assert result.exit_code == 0
    assert library["probe"] == {
        "pools": Path("pools"),
        "output": Path("art"),
        "domains": ("math", "history"),
    }
    assert library["show"] == {"path": Path("art")}
    chosen = ("--select", "6", "--criteria", "energy,taylor", "--units", "heads")
    invoke("probe", "--pools", "pools", "-o", "art", *chosen)
    assert library["probe"] == {
        "pools": Path("pools"),
        "output": Path("art"),
        "select": 6,
        "criteria": ("energy", "taylor"),
        "units": "heads",
    }
    invoke("artifacts", "import", "theirs", "-o", "ours", "--force")
    assert library["import_artifacts"] == {
        "directory": Path("theirs"),
        "output": Path("ours"),
        "force": True,
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["export", "--scenario", "s.txt"], export_result().to_dict()),
        (["plan", "--scenario", "s.txt"], plan_result().to_dict()),
        (["show", "art"], Shown("artifacts", {"layers": 30}, ()).to_dict()),
        (["probe", "--pools", "p", "-o", "a"], Shown("artifacts", {"layers": 30}, ()).to_dict()),
    ],
)
def test_json_is_the_librarys_own_record(library, arguments, expected):
    result = invoke(*arguments, "--json")
    assert json.loads(result.stdout) == json.loads(json.dumps(expected))
    assert result.stderr == ""


def test_plan_says_where_it_was_written(library, tmp_path):
    path = tmp_path / "plan.json"
    result = invoke("plan", "--scenario", "s.txt", "-o", path, "--quiet", "--force")
    assert result.stdout == f"{path}\n"
    assert library["plan"] == {"scenario": "s.txt", "output": path, "force": True}


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (
            ["plan", "--scenario", "my s.txt", "--keep", "0.6", "--model", "m", "--artifacts", "a"],
            "spp export --scenario 'my s.txt' --model m --artifacts a --keep 0.6",
        ),
        (["export", "--scenario", "s.txt"], "spp chat out/chemistry --prompt ..."),
        (
            ["export", "--scenario", "s.txt", "--no-verify"],
            "spp verify out/chemistry --scenario s.txt\nnext: spp chat out/chemistry --prompt ...",
        ),
        (
            ["probe", "--pools", "p", "-o", "art"],
            "spp export --artifacts art --scenario SCENARIO.txt",
        ),
    ],
)
def test_the_next_command(library, arguments, hint):
    result = invoke(*arguments)
    assert result.stderr == f"next: {hint}\n"


@pytest.mark.parametrize(
    ("error", "message", "code"),
    [
        (BudgetError("no plan"), "no plan", 2),
        (ParityError("differs"), "differs", 1),
        (
            OSError(28, "No space left on device", "out/w"),
            "out/w: no space left on the disk. Make room, or choose another disk.",
            2,
        ),
        (PermissionError(13, "Permission denied", "x.svg"), "x.svg: Permission denied.", 2),
        (
            MemoryError(),
            "out of memory. Use a machine with more, --dtype bfloat16, or another --device.",
            2,
        ),
        (
            ZeroDivisionError("division by zero"),
            "internal error: ZeroDivisionError: division by zero; run again with SPP_DEBUG=1 to "
            "see where.",
            2,
        ),
    ],
)
def test_errors_become_one_line_and_a_status(error, message, code):
    assert explain(error) == (message, code)


COMMANDS = [
    *("export", "convert", "plan", "frontier", "diagnose", "probe", "verify", "recover", "bench"),
    *("report", "push", "show", "chat", "doctor", "cache", "eval", "artifacts", "artifacts import"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_runnable_example(command):
    text = invoke(*command.split(), "--help").stdout
    assert f"Example: spp {command}" in text


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_no_word_is_shown_beside_a_flag(command):
    """Nor beside those that every typer command has."""
    text = invoke(*command.split(), "--help").stdout
    assert "--help" in text
    assert "<bool" not in text

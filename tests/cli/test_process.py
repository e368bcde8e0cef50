"""The command as a shell sees it: exit status, one line of error, and what it imports first."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from spp_cli.main import run

pytestmark = pytest.mark.thinned(most=4)

ROOT = Path(__file__).parents[2]
# What help may import beside the standard library; the help of a command also what checks requests.
LIGHT = {"annotated_doc", "click", "markdown_it", "mdurl", "pygments", "rich", "shellingham"}
LIGHT |= {"spp_bench", "spp_cli", "spp_export", "typer", "typing_extensions"}
CHECKING = {"annotated_types", "pydantic", "pydantic_core", "typing_inspection"}
# What an interpreter has imported before it runs anything.
INTERPRETER = {"__main__", "_distutils_hack", "_virtualenv", "sitecustomize", "usercustomize"}
# `spp --help` imports 354 modules today, and takes 0.3 s; a module more costs about a millisecond.
MOST_MODULES = 400


def environment(**changes):
    path = os.pathsep.join([str(ROOT / name) for name in ("", "cli", "benchmarks")])
    kept = {k: v for k, v in os.environ.items() if k not in ("SPP_DEBUG", "FORCE_COLOR")}
    return kept | {"PYTHONPATH": path} | changes


def spp(*arguments, **changes):
    return subprocess.run(
        [sys.executable, "-m", "spp_cli.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        stdin=subprocess.DEVNULL,
        env=environment(**changes),
    )


NOWHERE = (
    "nowhere: no such file or directory, and no model of that name in the cache, of which "
    "'spp cache' tells."
)


@pytest.fixture
def plan_file(tmp_path):
    layer = {"kv_heads": [0, 2], "query_heads": [0, 2, 6, 7], "channels": None}
    document = {
        "schema_version": 1,
        "model": {"fingerprint": "f" * 64, "source": "org/modèle"},
        "layout": "uniform",
        "compensation": "none",
        "layers": [layer, layer],
    }
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def imported(*arguments):
    """The modules of a process after it ran a command, and the packages that are not light."""
    script = (
        "import json, sys; from spp_cli.main import run; run(sys.argv[1:]); "
        "print(json.dumps(sorted(sys.modules)))"
    )
    command = [sys.executable, "-c", script, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment())
    modules = json.loads(result.stdout.splitlines()[-1])
    packages = {name.partition(".")[0] for name in modules if not name.startswith("_sysconfigdata")}
    return modules, packages - LIGHT - INTERPRETER - sys.stdlib_module_names


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_imports_little(argument):
    """Modules are counted; `make start-time` measures how long they take."""
    modules, heavy = imported(argument)
    assert heavy == set()
    assert len(modules) <= MOST_MODULES


@pytest.mark.parametrize(
    "arguments", [["plan", "--help"], ["chat", "--help"], ["plan", "--keep", "x"]]
)
def test_usage_and_its_errors_import_nothing_heavy(arguments):
    _, heavy = imported(*arguments)
    assert heavy <= CHECKING


@pytest.mark.parametrize(
    "arguments",
    [
        ["show", "nowhere"],
        ["plan", "--scenario", "missing.txt"],
        ["export"],
        ["diagnose", "-"],
        ["chat", "nowhere"],
        ["verify", "nowhere"],
        ["recover", "nowhere", "--data", "missing.txt"],
        ["convert", "nowhere", "-o", "elsewhere"],
    ],
)
def test_what_is_refused_before_a_model_is_read_imports_no_torch(arguments):
    modules, _ = imported(*arguments)
    assert not {"torch", "transformers", "scipy.linalg", "matplotlib", "jinja2"} & set(modules)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["xyzzy"], "No such command 'xyzzy'. See 'spp --help'."),
        (["plan"], "Missing option '--scenario'. See 'spp plan --help'."),
        (
            ["plan", "--scenario", "x", "--layout", "square"],
            "Invalid value for '--layout': 'square' is not one of 'uniform', 'per-layer', "
            "'ragged'. See 'spp plan --help'.",
        ),
        (
            ["plan", "--scenario", "x", "--max-params", "1.5X"],
            "Invalid value for '--max-params': '1.5X' is not a count such as 1500, 12k, 1.5M or "
            "2Gi. See 'spp plan --help'.",
        ),
        (["plan", "--scenario", "missing.txt"], "scenario missing.txt: no such file."),
        (
            ["plan", "--scenario", "x", "--keep", "0.5", "--strength", "1"],
            "budget: expected exactly one of keep, max_params, max_kv_bytes, max_latency, "
            "strength, got keep and strength.",
        ),
        (["export"], "export needs --scenario FILE or --plan FILE."),
        (["show", "nowhere"], NOWHERE),
    ],
)
def test_bad_usage_is_one_line_and_exits_with_2(capsys, arguments, message):
    assert run(arguments) == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")


def test_a_process_ends_with_the_status_and_the_line():
    result = spp("xyzzy")
    message = "error: No such command 'xyzzy'. See 'spp --help'.\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", message)


@pytest.mark.parametrize("arguments", [[], ["artifacts"]])
def test_a_bare_group_shows_its_help_and_exits_with_2(arguments):
    result = spp(*arguments)
    assert result.returncode == 2
    assert "Usage: spp" in result.stdout
    assert result.stderr == ""


def test_errors_are_one_json_object_too(capsys):
    assert run(["show", "nowhere", "--json"]) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {
        "error": NOWHERE,
        "exit_code": 2,
    }
    assert printed.err == f"error: {NOWHERE}\n"


def test_debug_shows_the_traceback(capsys, monkeypatch):
    monkeypatch.setenv("SPP_DEBUG", "1")
    assert run(["show", "nowhere"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback")
    assert printed.endswith(f"error: {NOWHERE}\n")


def test_show_a_plan(plan_file, capsys):
    assert run(["show", str(plan_file)]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[:2] == ["plan", "model         org/modèle"]
    assert printed.err == ""


def test_an_encoding_without_our_letters_still_gets_every_line(plan_file):
    result = spp("show", plan_file, PYTHONIOENCODING="ascii")
    assert result.returncode == 0
    assert r"org/mod\xe8le" in result.stdout
    shown = spp("show", plan_file, "--json", PYTHONIOENCODING="ascii")
    assert json.loads(shown.stdout)["facts"]["model"] == "org/modèle"


def test_a_reader_that_goes_away_is_no_error(plan_file):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "spp_cli.main", "show", str(plan_file)]
    result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, env=environment())
    os.close(writing)
    assert (result.returncode, result.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("number", "status", "line"),
    [
        (signal.SIGINT, 130, "error: interrupted.\n"),
        (signal.SIGTERM, 143, "error: terminated.\n"),
        (signal.SIGHUP, 129, "error: terminated.\n"),
    ],
)
def test_stopped_by_a_signal(number, status, line):
    command = [sys.executable, "-m", "spp_cli.main", "plan", "--scenario", "-"]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    # It reads the scenario first; more than a pipe holds has gone in only once it does.
    process.stdin.write("word " * 100_000)
    process.send_signal(number)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (status, "", line)


@pytest.mark.parametrize(
    ("number", "status", "line"),
    [(signal.SIGINT, 130, "error: interrupted.\n"), (signal.SIGTERM, 143, "error: terminated.\n")],
)
def test_a_signal_that_comes_while_something_is_collected_is_not_lost(number, status, line):
    script = f"""
import os, sys, time
from spp_cli import main

def collected():
    try:
        yield
    finally:
        os.kill(os.getpid(), {int(number)})
        time.sleep(0.1)

def app(**_):
    waiting = collected()
    next(waiting)
    del waiting
    time.sleep(30)

main.app = app
main.main()
"""
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert (result.returncode, result.stdout, result.stderr) == (status, "", line)


def test_completion_is_offered():
    result = spp(_SPP_COMPLETE="complete_bash", COMP_WORDS="spp ver", COMP_CWORD="1")
    assert result.stdout.split() == ["verify"]


def test_the_reference_is_the_same_everywhere():
    wide = {"COLUMNS": "200", "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "spp_cli.reference"]
    first, second = (
        subprocess.run(command, capture_output=True, text=True, env=environment(**changes)).stdout
        for changes in ({}, wide)
    )
    assert first == second
    assert first.isascii()
    assert max(map(len, first.splitlines())) <= 80
    for command in (
        "export",
        "plan",
        "diagnose",
        "probe",
        "verify",
        "show",
        "chat",
        "artifacts import",
    ):
        assert f"$ spp {command} --help\n" in first

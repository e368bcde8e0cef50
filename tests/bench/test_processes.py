"""Functions in fresh processes: what they answer, and how they fail."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from spp_bench.processes import run_fresh

# Where the fresh process finds this module.
HERE = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}


def fail(error: Exception) -> dict[str, Any]:
    print("a note")
    raise error


def leave(words: str) -> dict[str, Any]:
    print(words, end="", flush=True)
    os._exit(3)


def be_killed() -> dict[str, Any]:
    os.kill(os.getpid(), 9)
    return {}


def sleep() -> dict[str, Any]:
    time.sleep(60)
    return {}


def answer(path: Path) -> dict[str, Any]:
    return {"like": os.environ["LIKE"], "name": path.name, "process": os.getpid()}


@pytest.mark.parametrize(
    ("function", "arguments", "error"),
    [
        (fail, [KeyError("x")], "KeyError: 'x'"),
        (fail, [AssertionError()], "AssertionError"),
        (leave, ["last words"], "last words"),
        (leave, [""], "exit status 3."),
        (be_killed, [], "killed, as the kernel does where memory runs out."),
        (sleep, [], "took more than 0.5 s."),
    ],
)
def test_a_failure_is_one_line(function, arguments, error):
    limit = 0.5 if function is sleep else 3600
    assert run_fresh(function, *arguments, limit_s=limit, environment=HERE) == {"error": error}


def test_the_answer_is_of_another_process_with_its_environment():
    result = run_fresh(answer, Path("a"), environment={**HERE, "LIKE": "this"})
    assert (result["like"], result["name"]) == ("this", "a")
    assert result["process"] != os.getpid()

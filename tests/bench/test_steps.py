"""Steps of a benchmark in processes of their own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from spp_campaigns import steps


def step(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Run `script` in place of a step; its argv is that step's own."""
    run = steps._run

    def replaced(line: list[str], log: Path, *others: Any) -> int | None:
        return run([sys.executable, "-c", script, *line[3:]], log, *others)

    monkeypatch.setattr(steps, "_run", replaced)


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("print('a note'); raise KeyError('x')", "KeyError: 'x'"),
        ("assert False", "AssertionError"),
        ("import os; print('last words', flush=True); os._exit(3)", "last words"),
        ("import os; os._exit(3)", "exit status 3."),
        ("import os; os.kill(os.getpid(), 9)", "killed, as the kernel does where memory runs out."),
        ("import time; time.sleep(60)", "took more than 0.5 s."),
    ],
)
def test_a_failing_step_is_one_line(monkeypatch, script, error):
    step(monkeypatch, script)
    limit = 0.5 if "sleep" in script else 3600
    assert steps.run_step("child", [], limit) == {"error": error}


def test_a_step_answers_and_sees_its_environment(monkeypatch):
    write = "open(sys.argv[-1], 'w').write(json.dumps([os.environ['LIKE'], *sys.argv[1:-1]]))"
    step(monkeypatch, f"import json, os, sys; {write}")
    assert steps.run_step("child", ["a"], 3600, {"LIKE": "this"}) == ["this", "a"]

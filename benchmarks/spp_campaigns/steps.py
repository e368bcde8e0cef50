"""Runs a module of spp_bench in a process of its own, for a limited time."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_LONGEST_ERROR = 300
# From the last line that names an exception.
_EXCEPTION = re.compile(
    r"^[\w.]*(?:Error|Exception|Interrupt|Exit|Fail\w*)(?:: .*)?$", re.MULTILINE
)


def run_step(
    module: str, arguments: list[str], limit_s: float, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What `python -m spp_campaigns.<module> ARGUMENTS FILE` wrote to FILE as JSON, or {"error"}
    in one line."""
    with tempfile.TemporaryDirectory(prefix="spp-step-") as scratch:
        answer, log = Path(scratch, "answer.json"), Path(scratch, "log")
        command = [sys.executable, "-m", f"spp_campaigns.{module}", *arguments, str(answer)]
        status = _run(command, log, limit_s, {**os.environ, **(environment or {})})
        if status is None:
            return {"error": f"took more than {limit_s:g} s."}
        if status or not answer.exists():
            return {"error": _error(log.read_text(encoding="utf-8", errors="replace"), status)}
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found


def _run(
    command: list[str], log: Path, limit_s: float, environment: Mapping[str, str]
) -> int | None:
    """Exit status of a command with all its children; None where they had to be killed."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=environment, start_new_session=True
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def one_line(text: str) -> str:
    """The beginning of what went wrong."""
    return " ".join(text.split())[:_LONGEST_ERROR]


def _error(log: str, status: int) -> str:
    if status == -signal.SIGKILL:
        return "killed, as the kernel does where memory runs out."
    if named := list(_EXCEPTION.finditer(log)):
        return one_line(log[named[-1].start() :])
    lines = [line for line in log.splitlines() if line.strip()]
    return one_line(lines[-1]) if lines else f"exit status {status}."

"""A function in a fresh process, and how much memory a process holds.

The process is fresh because what an older one has loaded or freed would be counted as well. This
module imports nothing of this project, since some of what runs here must not see it.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

_PROC = Path("/proc/self")
_LONGEST_ERROR = 300
# From the last line that names an exception.
_EXCEPTION = re.compile(
    r"^[\w.]*(?:Error|Exception|Interrupt|Exit|Fail\w*)(?:: .*)?$", re.MULTILINE
)


def run_fresh(
    function: Callable[..., Mapping[str, Any]],
    *arguments: Any,
    limit_s: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What a module's function returns in a fresh process, or {"error"}, one line, where it fails
    or takes more than `limit_s` seconds. Arguments are pickled, the answer is JSON."""
    module = function.__module__
    if module == "__main__":
        spec = sys.modules["__main__"].__spec__
        assert spec is not None, "run as python -m"
        module = spec.name
    with tempfile.TemporaryDirectory(prefix="spp-fresh-") as scratch:
        answer, log = Path(scratch, "answer.json"), Path(scratch, "log")
        command = [sys.executable, "-m", "spp_bench.processes", module, function.__name__]
        job, settings = pickle.dumps(arguments), {**os.environ, **(environment or {})}
        status = _run([*command, str(answer)], job, log, limit_s, settings)
        if status is None:
            return {"error": f"took more than {limit_s:g} s."}
        if status or not answer.exists():
            return {"error": _error(log.read_text(encoding="utf-8", errors="replace"), status)}
        result: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return result


def _run(
    command: list[str], job: bytes, log: Path, limit_s: float | None, environment: dict[str, str]
) -> int | None:
    """Exit status of a command with all its children; None where they had to be killed."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=file,
            env=environment,
            start_new_session=True,
        )
        try:
            process.communicate(job, limit_s)
            return process.returncode
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def single_line(text: str) -> str:
    """What went wrong, in one line, cut short where it is long."""
    return " ".join(text.split())[:_LONGEST_ERROR]


def _error(log: str, status: int) -> str:
    if status == -signal.SIGKILL:
        return "killed, as the kernel does where memory runs out."
    if named := list(_EXCEPTION.finditer(log)):
        return single_line(log[named[-1].start() :])
    lines = [line for line in log.splitlines() if line.strip()]
    return single_line(lines[-1]) if lines else f"exit status {status}."


def held(device: str = "cpu") -> int:
    """Bytes held now: what PyTorch allocated on the card, or this process's resident memory."""
    if _on_card(device):
        import torch

        return torch.cuda.memory_allocated(device)
    return status_bytes("VmRSS") or _resource_peak()


def peak(device: str = "cpu") -> int:
    """Bytes held at most since `restart_peak`, or since the start where that is not possible."""
    if _on_card(device):
        import torch

        return torch.cuda.max_memory_allocated(device)
    # Not from getrusage first: it may still give the peak of the parent process.
    return status_bytes("VmHWM") or _resource_peak()


def restart_peak(device: str = "cpu") -> None:
    """Forget the peak so far, where the system can."""
    if _on_card(device):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # Linux alone
        (_PROC / "clear_refs").write_text("5", encoding="ascii")


def status_bytes(field: str, process: int | None = None) -> int:
    """A field of a process's status, this one's if None, in bytes; 0 where the system does not have
    it."""
    status = (_PROC if process is None else _PROC.with_name(str(process))) / "status"
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return 0


def _on_card(device: str) -> bool:
    return device.startswith("cuda") and "torch" in sys.modules


def _resource_peak() -> int:
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def main(module: str, name: str, answer: str) -> None:
    """Run a job that our own parent process wrote to standard input, and answer it."""
    arguments = pickle.load(sys.stdin.buffer)
    result = getattr(import_module(module), name)(*arguments)
    Path(answer).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

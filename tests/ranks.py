"""Runs `spp` as torchrun does, in forked children of a process that has imported everything.

`python ranks.py` reads one JSON object a line from standard input (`Ranks.run` writes it), starts
that many ranks, sends SIGTERM to all others once one has failed, and answers with how each ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

_POLL_S = 0.01
# What imports the rest of what a command runs on.
_NEEDED = (
    "spp_cli.main",
    "spp_export.commands.evaluate",
    "spp_export.commands.export",
    "spp_export.domains.probe_model",
    "spp_export.models.layerwise",
    "spp_export.evaluation.parity",
    "torch.distributed",
    "torch.distributed.rendezvous",
    "transformers.models.llama.modeling_llama",
)


@dataclass(frozen=True)
class Rank:
    """How a rank ended: its status as `subprocess` has it, and what it said."""

    status: int
    out: str
    err: str


class Ranks:
    """Starts ranks; one process, which all commands are forked from."""

    def __init__(self) -> None:
        from torch.distributed import TCPStore

        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._store = TCPStore
        self._stores: list[Any] = []

    def run(
        self,
        arguments: Sequence[str | Path],
        size: int,
        *,
        faults: dict[int, tuple[str, str, str]] | None = None,
        **environment: str,
    ) -> list[Rank]:
        """A command on so many ranks. `faults` has, by rank, a module, a function of it and what
        happens when it is called: "killed", "error", "hang", or "ended" for SIGTERM to all."""
        # Where torchrun's agent keeps it, which outlives each rank.
        store = self._store("127.0.0.1", 0, None, True, wait_for_workers=False)
        self._stores.append(store)
        asked = {
            "arguments": [str(item) for item in arguments],
            "size": size,
            "port": store.port,
            "faults": faults or {},
            "environment": {**os.environ, **environment},
        }
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return [Rank(*ended) for ended in json.loads(self._process.stdout.readline())]

    def close(self) -> None:
        """End the process."""
        with self._process:
            assert self._process.stdin
            self._process.stdin.close()


def _serve() -> None:
    for name in _NEEDED:
        import_module(name)
    for line in sys.stdin:
        print(json.dumps(_together(**json.loads(line))), flush=True)


def _together(
    arguments: list[str],
    size: int,
    port: int,
    faults: dict[str, list[str]],
    environment: dict[str, str],
) -> list[tuple[int, str, str]]:
    streams = [[os.dup(f.fileno()) for f in (_file(), _file())] for _ in range(size)]
    running: dict[int, int] = {}
    ended: dict[int, int] = {}
    for rank in range(size):
        pid = os.fork()
        if not pid:
            with contextlib.suppress(BaseException):
                os.environ.clear()
                os.environ.update(environment, **_torchrun(rank, size, port))
                _child(arguments, streams[rank], faults.get(str(rank)))
            os._exit(99)
        running[pid] = rank
    told = False
    signal.signal(signal.SIGUSR1, lambda *_: [os.kill(pid, signal.SIGTERM) for pid in running])
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            time.sleep(_POLL_S)
            continue
        code = ended[running.pop(pid)] = os.waitstatus_to_exitcode(status)
        if code and not told:
            told = True
            for other in running:
                os.kill(other, signal.SIGTERM)
    return [(ended[rank], *map(_content, streams[rank])) for rank in range(size)]


def _torchrun(rank: int, size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _child(arguments: list[str], streams: Sequence[int], fault: Sequence[str] | None) -> None:
    os.dup2(streams[0], 1)
    os.dup2(streams[1], 2)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    if fault:
        module, name, what = fault
        setattr(import_module(module), name, _fault(what))
    sys.argv = ["spp", *arguments]
    try:
        import_module("spp_cli.main").main()
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(end.code if isinstance(end.code, int) else 98)


def _fault(what: str) -> Callable[..., None]:
    def happen(*_: object, **__: object) -> None:
        from spp_export.common.errors import BudgetError

        if what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "error":
            raise BudgetError("this rank's own budget is used up. Give it more.")
        if what == "ended":
            os.kill(os.getppid(), signal.SIGUSR1)
        time.sleep(3600)

    return happen


def _file() -> Any:
    return tempfile.TemporaryFile()


def _content(descriptor: int) -> str:
    with os.fdopen(descriptor, "rb") as file:
        file.seek(0)
        return file.read().decode()


if __name__ == "__main__":
    _serve()

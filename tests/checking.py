"""What scripts have in common that check prebuilt checkpoints where other programs are installed.

Of the standard library alone. Such a script puts this folder on its path before it imports it.
"""

from __future__ import annotations

import socket
import subprocess
import time
import traceback
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any


class WrongResultError(Exception):
    """Something else is computed or answered than what must be, or nothing is said of why not."""


def require(condition: bool, complaint: str) -> None:
    """WrongResultError with the complaint unless the condition holds."""
    if not condition:
        raise WrongResultError(complaint)


def attempt(name: str, check: Any, *arguments: Any) -> bool:
    """One line about a check; the traceback of what failed is on standard error."""
    try:
        print(f"ok     {name}: {check(*arguments)}", flush=True)
    except Exception as error:
        traceback.print_exc()
        print(f"FAILED {name}: {type(error).__name__}: {error}", flush=True)
        return False
    return True


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def wait_for(
    url: str, process: subprocess.Popen[bytes], log: Path, starting: float, answering: float
) -> None:
    """Return once the server is well. Raises WrongResultError where it ends, or is not after
    `starting` seconds; it has `answering` seconds to say so each time."""
    last = time.monotonic() + starting
    while time.monotonic() < last:
        require(process.poll() is None, f"the server ended, {log}: {log.read_text()[-600:]}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=answering):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    raise WrongResultError(f"the server did not answer in {starting} s: {log}")

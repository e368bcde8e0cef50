"""Settings that hold for every test: no network, no trace outside pytest's own directories."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

# transformers copies a checkpoint's own code here before it runs it, and reads the variables once,
# when it is first imported.
_MODULES = tempfile.mkdtemp(prefix="spp-tests-")
os.environ["HF_MODULES_CACHE"] = _MODULES
os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny matrices are slower on several threads, and round by their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell in the background ignores these, and so would every process that tests start and signal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Without a card the Triton kernels run in triton's interpreter, which is chosen at its import.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(_MODULES, ignore_errors=True)

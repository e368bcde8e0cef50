"""What a results file says about its origin: machine, libraries, revision."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from spp_export.common.versions import library_versions
from spp_export.common.versions import machine as machine_used

_OPTIONAL = (
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-genai",
    "xllamacpp",
    "triton",
)


def physical_cores() -> int:
    """Physical cores that this process may use; logical ones where psutil is not installed."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        import psutil
    except ImportError:
        return max(1, allowed or 1)
    return max(1, min(psutil.cpu_count(logical=False) or 1, allowed or 1))


def machine(device: str) -> dict[str, Any]:
    """Processor, cores, threads, memory and, where one is used, the card and its driver."""
    record = machine_used(device) | {"memory_bytes": _memory_bytes()}
    if device.startswith("cuda"):
        record["driver"] = _output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
    return record


def _memory_bytes() -> int | None:
    try:
        import psutil
    except ImportError:
        known = os.sysconf_names if hasattr(os, "sysconf_names") else {}
        if {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= known.keys():
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return None
    return int(psutil.virtual_memory().total)


def versions(*also: str) -> dict[str, str]:
    """Versions of Python, this project, everything that ran a model, and the packages in
    `also`."""
    installed = library_versions()
    for name in (*_OPTIONAL, *also):
        with suppress(PackageNotFoundError):
            installed[name] = version(name)
    return installed


def revision() -> dict[str, Any] | None:
    """The commit that this code is of, and whether files differ from it; None outside a clone."""
    here = Path(__file__).resolve().parent
    commit = _output("git", "-C", str(here), "rev-parse", "HEAD")
    tracked = _output("git", "-C", str(here), "ls-files", "--", Path(__file__).name)
    if not commit or not tracked:
        return None
    changed = _output("git", "-C", str(here), "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "modified": bool(changed)}


def _output(*command: str) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = result.stdout.strip().splitlines()
    return lines[0].strip() if lines and not result.returncode else None

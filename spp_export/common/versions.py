"""Versions of what decided a result, for plans, artifacts and reports."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_LIBRARIES = ("numpy", "safetensors", "tokenizers", "torch", "transformers")


def spp_version() -> str:
    """Our own version."""
    try:
        return version("spp-export")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0+unknown"


def library_versions() -> dict[str, str]:
    """Versions of Python, ourselves and the libraries whose arithmetic or bytes we rely on."""
    versions = {"python": platform.python_version(), "spp-export": spp_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


_CPUINFO = Path("/proc/cpuinfo")


def machine(device: str) -> dict[str, Any]:
    """Processor, its cores and the threads used, and the accelerator's name where one is used."""
    import torch

    facts: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device_type(device) == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(None if device == "auto" else device)
    return facts


def device_type(device: str) -> str:
    """cpu, cuda, ... of the name of a device; auto takes an accelerator where there is one."""
    import torch

    if device != "auto":
        return device.partition(":")[0]
    return "cuda" if torch.cuda.is_available() else "cpu"


def cpu_name() -> str:
    """The processor as its maker calls it."""
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

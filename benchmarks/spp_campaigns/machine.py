"""What every measurement states beside its numbers: the machine and the versions."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from spp_export.common.versions import cpu_name, library_versions

# What only some measurements rest on, where it is installed.
_OTHERS = ("onnx", "onnx-ir", "onnxruntime", "onnxruntime-genai", "triton")


def machine() -> dict[str, Any]:
    """Processor, cores and library versions."""
    return {"cpu": cpu_name(), "cores": os.cpu_count(), **library_versions(), **_others()}


def _others() -> dict[str, str]:
    found = {}
    for name in _OTHERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

"""Versions of what decided a result, for plans, artifacts and reports."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

_LIBRARIES = ("numpy", "safetensors", "tokenizers", "torch", "transformers")


def spp_version() -> str:
    """Our own version."""
    try:
        return version("spp-export")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0+unknown"


def library_versions() -> dict[str, str]:
    """Versions of Python, ourselves and the libraries whose arithmetic or bytes we rely on."""
    found = {"python": platform.python_version(), "spp-export": spp_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

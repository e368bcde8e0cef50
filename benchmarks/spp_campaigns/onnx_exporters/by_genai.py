"""The model builder of onnxruntime-genai, as its command line."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from unittest.mock import patch

import onnxruntime_genai  # noqa: F401

BUILDER = "onnxruntime_genai.models.builder"


def export(slim: Path, out: Path) -> None:
    """Build fp32 for the CPU, with the checkpoint's own code allowed."""
    options = {"-m": slim, "-o": out, "-p": "fp32", "-e": "cpu", "-c": out / "cache"}
    words = [word for pair in options.items() for word in map(str, pair)]
    with patch.object(sys, "argv", [BUILDER, *words, "--extra_options", "hf_remote=true"]):
        runpy.run_module(BUILDER, run_name="__main__")

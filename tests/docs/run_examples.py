"""The scripts of examples/, each in a process and an empty directory of its own.

`make test-examples` runs it; pytest does not collect it by itself.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# What a script prints at the end, at least a part of it.
PRINTED = {
    "export_from_python.py": "layer 0: query heads",
    "many_scenarios.py": "Who signed the Magna Carta? -> history",
    "onnx_runtime.py": "Name three noble gases",
    "llama_cpp.py": "acid",
}
VLLM = "vllm_offline.py"


def run(name: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """A script's output and status."""
    command = [sys.executable, str(EXAMPLES / name)]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)


def test_every_script_is_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*PRINTED, VLLM}


@pytest.mark.parametrize("name", PRINTED)
def test_a_script_runs(name: str, tmp_path: Path) -> None:
    ended = run(name, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert PRINTED[name] in ended.stdout


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_is_asked_for_in_one_line(tmp_path: Path) -> None:
    ended = run(VLLM, tmp_path)
    assert ended.returncode == 1
    assert ended.stderr == "vllm_offline.py needs vLLM and a CUDA card. Run: pip install vllm\n"
    assert not list(tmp_path.iterdir())

"""The scripts of examples/, each in a process and an empty directory of its own.

`make test-examples` runs it, and `make test-quantised` the script that needs llm-compressor; pytest
does not collect it by itself.
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
    "quantise.py": "acid",
}
# What is not installed beside this project, and the line that says so.
NEEDED = {
    "quantise.py": (
        "llmcompressor",
        "quantise.py needs llm-compressor. Run: pip install llmcompressor\n",
    ),
    "vllm_offline.py": (
        "vllm",
        "vllm_offline.py needs vLLM and a CUDA card. Run: pip install vllm\n",
    ),
}
HERE = {name for name, (package, _) in NEEDED.items() if importlib.util.find_spec(package)}


def run(name: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """A script's output and status."""
    command = [sys.executable, str(EXAMPLES / name)]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)


def test_every_script_is_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*PRINTED, *NEEDED}


@pytest.mark.parametrize("name", [name for name in PRINTED if name in HERE or name not in NEEDED])
def test_a_script_runs(name: str, tmp_path: Path) -> None:
    ended = run(name, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert PRINTED[name] in ended.stdout


@pytest.mark.parametrize("name", [name for name in NEEDED if name not in HERE])
def test_what_is_missing_is_said_in_one_line(name: str, tmp_path: Path) -> None:
    ended = run(name, tmp_path)
    assert ended.returncode == 1
    assert ended.stderr == NEEDED[name][1]
    assert not list(tmp_path.iterdir())

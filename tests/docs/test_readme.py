"""README's "Use" is a script that runs in an empty directory; what pages show is understood."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from typer._click.exceptions import MissingParameter
from typer.main import get_command

from spp_cli.main import app

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
USE = README.partition("\n## Use\n")[2].partition("\n## ")[0]
SHELL, PYTHON = (
    re.search(rf"^```{kind}\n(.*?)^```", USE, re.M | re.S) for kind in ("bash", "python")
)
assert SHELL
assert PYTHON
COMMANDS = re.findall(r"^spp .*$", SHELL[1], re.MULTILINE)
PAGES = ["README.md", "CONTRIBUTING.md", "examples/README.md"]
PAGES += [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def understood(line: str) -> None:
    """Parse a command line with types and choices, as the command would; nothing runs."""
    _, *words = shlex.split(line, comments=True)
    command: Any = get_command(app)
    name = "spp"
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        name, *words = words
        command = command.commands[name]
    assert command.make_context(name, words).params is not None


@pytest.mark.parametrize("line", COMMANDS)
def test_a_line_of_use_is_understood(line: str) -> None:
    understood(line)


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_shows_is_understood(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for line in re.findall(r"^\$ (spp [a-z].*)$", text, re.MULTILINE):
        understood(line)
    for line in re.findall(r"`(spp [a-z][^`\n]+)`", text):
        # A sentence may name one option of a command and leave out what the command needs.
        with suppress(MissingParameter):
            understood(line)


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

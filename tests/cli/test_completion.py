"""Completion by the shell, over the environment as the shells' scripts do it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from test_process import environment, spp

# Typer looks at the parent process for the shell unless this is set.
GIVEN_SHELL = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}


def choices(shell: str, *words: str) -> list[str]:
    """What the shell is offered for the last of these words, without descriptions."""
    line = " ".join(["spp", *words])
    asked = {
        "bash": {"COMP_WORDS": line, "COMP_CWORD": str(len(words))},
        "fish": {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    result = spp(_SPP_COMPLETE=f"complete_{shell}", **asked)
    assert result.stderr == ""
    return [line.split("\t")[0] for line in result.stdout.splitlines() if line]


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_names_of_commands(shell):
    assert choices(shell, "ex") == ["export"]
    assert choices(shell, "artifacts", "i") == ["import"]
    assert {"export", "plan", "push", "doctor"} <= set(choices(shell, ""))


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_options_and_their_values(shell):
    assert "--layout" in choices(shell, "export", "--la")
    assert choices(shell, "export", "--layout", "") == ["uniform", "per-layer", "ragged"]
    assert choices(shell, "export", "--layout", "un") == ["uniform"]
    assert choices(shell, "convert", "--format", "") == ["onnx", "gguf"]


def test_a_description_is_one_line():
    """Or fish offers the rest of it."""
    assert all(word.startswith("--") for word in choices("fish", "export", "--"))


def test_files_are_left_to_the_shell():
    assert choices("bash", "verify", "ou") == []


def test_it_answers_without_anything_heavy():
    heavy = "{'torch', 'transformers', 'numpy'}"
    script = (
        f"import atexit, sys; atexit.register(lambda: print({heavy} & sys.modules.keys())); "
        "from spp_cli.main import run; run([])"
    )
    asked = {"_SPP_COMPLETE": "complete_bash", "COMP_WORDS": "spp ex", "COMP_CWORD": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment(**asked)
    )
    assert result.stdout.splitlines() == ["export", "set()"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_shown_and_installed(shell, tmp_path):
    shown = spp("--show-completion", shell, **GIVEN_SHELL)
    assert shown.returncode == 0
    assert "_SPP_COMPLETE=complete_" in shown.stdout
    installed = spp("--install-completion", shell, HOME=str(tmp_path), **GIVEN_SHELL)
    assert installed.returncode == 0
    written = [path.read_text() for path in Path(tmp_path).rglob("*") if path.is_file()]
    assert any("_SPP_COMPLETE=complete_" in text for text in written)

"""Every help page has an example, and what pages and README show is understood by the commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from spp_cli.main import app

ROOT = Path(__file__).resolve().parents[2]
SPP = get_command(app)
EXAMPLE = re.compile(r"^Example: (.*?)(?:\n\n|\Z)", re.DOTALL | re.MULTILINE)


def commands(name, command):
    """Every command and group with the words that reach it."""
    yield name, command
    for child, inner in getattr(command, "commands", {}).items():
        yield from commands((*name, child), inner)


def understood(words, command=SPP, parent=None):
    """The words of the command that would run; its arguments are parsed, with types and choices."""
    name, *rest = words
    # A group would show its help where a word is missing, and end the process.
    context = command.make_context(name, list(rest), parent=parent)
    children = getattr(command, "commands", None)
    if children is None:
        return (name,)
    child = context._protected_args[0] if context._protected_args else context.args[0]
    assert child in children, f"{child}: no such command"
    after = rest[rest.index(child) :]
    return (name, *understood(after, children[child], context))


COMMANDS = dict(commands(("spp",), SPP))
LEAVES = [name for name, command in COMMANDS.items() if not hasattr(command, "commands")]
SHOWN = [
    (path.name, line)
    for path in (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
    for line in re.findall(r"^\$ (spp .*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
]


@pytest.mark.parametrize("name", COMMANDS, ids=" ".join)
def test_a_help_page_has_examples_of_its_command(name):
    examples = EXAMPLE.findall(COMMANDS[name].help or "")
    assert examples, "no line that begins with 'Example:'"
    for example in examples:
        reached = understood(shlex.split(example))
        assert reached[: len(name)] == name
        assert reached in LEAVES


@pytest.mark.parametrize(("page", "line"), SHOWN, ids=str)
def test_what_a_page_shows_is_understood(page, line):
    assert understood(shlex.split(line, comments=True)) in LEAVES


def test_an_example_with_a_wrong_flag_is_noticed():
    for wrong in ("spp export --scenari x", "spp verify", "spp export --layout odd", "spp expor"):
        with pytest.raises(Exception, match=r"."):
            understood(shlex.split(wrong))

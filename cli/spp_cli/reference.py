"""The help of every command as one page: `python -m spp_cli.reference > cli/README.md`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from typer.main import get_command

from spp_cli.main import app

_WIDTH = 80


def render() -> str:
    """Every command with its help, 80 columns wide, without colours, the same on every machine."""
    return "\n".join(_helps("spp", get_command(app), None))


def page() -> str:
    """The same as Markdown."""
    return f"# Commands\n\nWritten by `make reference`.\n\n```text\n{render()}```\n"


def _helps(name: str, command: Any, parent: Any) -> Iterator[str]:
    command.rich_markup_mode = None  # plain text instead of boxes drawn for the terminal at hand
    context = command.context_class(
        command,
        parent=parent,
        info_name=name,
        terminal_width=_WIDTH,
        max_content_width=_WIDTH,
        **command.context_settings,
    )
    yield f"$ {context.command_path} --help"
    yield command.get_help(context).rstrip() + "\n"
    for child, inner in getattr(command, "commands", {}).items():
        yield from _helps(child, inner, context)


if __name__ == "__main__":
    print(page(), end="")

"""The commands' help as documentation.

python -m spp_cli.reference > cli/README.md     # the help of every command, as one page
python -m spp_cli.reference --readme README.md  # the table of commands in a file, renewed
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from typer.main import get_command

from spp_cli.main import app

_WIDTH = 80
# What is between these lines of a file is ours.
_BEGIN = "<!-- commands, by make reference -->"
_END = "<!-- end of commands -->"


def render() -> str:
    """Every command with its help, 80 columns wide, without colours, the same on every machine."""
    return "\n".join(_helps("spp", get_command(app), None))


def page() -> str:
    """The same as Markdown."""
    return f"# Commands\n\nWritten by `make reference`.\n\n```text\n{render()}```\n"


def table() -> str:
    """Every command with the first line of its help, as a Markdown table."""
    rows = [f"| `{name}` | {text} |" for name, text in _summaries("spp", get_command(app))]
    return "\n".join(["| command | what it does |", "|---|---|", *rows])


def with_table(text: str) -> str:
    """A file's text with the table of commands between its two markers as it is now.

    Raises ValueError where the markers are not there, once each and in this order.
    """
    before, begin, rest = text.partition(_BEGIN)
    old, end, after = rest.partition(_END)
    if not (begin and end) or _BEGIN in old + after or _END in before + after:
        raise ValueError(f"expected one line {_BEGIN} and then one line {_END}")
    return f"{before}{_BEGIN}\n\n{table()}\n\n{_END}{after}"


def _summaries(name: str, command: Any) -> Iterator[tuple[str, str]]:
    """Names and one-line helps of what can be run; a group is no more than its commands."""
    children = getattr(command, "commands", {})
    if not children:
        yield name, " ".join(command.help.split("\n\n")[0].split()).replace("|", "\\|")
    for child, inner in children.items():
        yield from _summaries(f"{name} {child}", inner)


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the page, or renew the table in a file."""
    parser = argparse.ArgumentParser(prog="spp_cli.reference", description=__doc__)
    parser.add_argument("--readme", type=Path, metavar="FILE", help="file with the two markers")
    readme = parser.parse_args(arguments).readme
    if readme is None:
        print(page(), end="")
    else:
        readme.write_text(with_table(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()

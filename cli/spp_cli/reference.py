"""The commands' help, and what each family can become, as documentation.

python -m spp_cli.reference > cli/README.md     # the help of every command, as one page
python -m spp_cli.reference --readme README.md  # the table of commands in a file, renewed
python -m spp_cli.reference --families > docs/families.md  # families, formats and layouts
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from typer.main import get_command

from spp_cli.main import app
from spp_export.formats.registry import FORMATS
from spp_export.models.engines import vllm
from spp_export.models.families import FAMILIES
from spp_export.models.shape import Layout

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


_FAMILIES = """\
# Which family, in which format and layout?

Written by `make reference` from the records of the families. A cell says whether `spp export`
writes a model of the family in that format and layout. *Yes* under safetensors, ONNX and GGUF is a
test: a tiny random model is sliced, written, loaded in transformers, ONNX Runtime or llama.cpp, and
compared (`tests/models/test_families_contract.py`, `tests/formats/test_family_table.py`). A number
is the reason below why there is none, which is what the command says as well. *Channels* and
*experts* are what alone can go in layout `uniform` where the engine's class takes no other number
of heads. The columns of vLLM are about safetensors directories (`make test-vllm`); it takes one
number of experts and one width of them for all layers, so per-layer means heads there.

A model's config.json may ask for more than its family does as a rule, such as a sliding window that
llama.cpp does not know in it; then the command refuses that model by name. Models that see are
written as safetensors, whatever their decoder is.

"""
_LAYOUTS: tuple[Layout, ...] = ("per-layer", "uniform")


def families() -> str:
    """Every family by format and layout, as a page of Markdown."""
    reasons: dict[str, int] = {}

    def cell(reason: str | None, yes: str = "yes") -> str:
        return yes if reason is None else str(reasons.setdefault(reason, len(reasons) + 1))

    columns = [(name, layout) for name in FORMATS for layout in _LAYOUTS]
    columns.insert(1, ("safetensors", "ragged"))
    names = [f"{name} {layout}" for name, layout in columns]
    names += [f"vLLM {layout}" for layout in _LAYOUTS]
    rows = []
    for family in FAMILIES.values():
        cells = []
        for name, layout in columns:
            units = FORMATS[name].uniform_units(family) if layout == "uniform" else "all"
            reason = FORMATS[name].refusal(family, layout)
            cells.append(cell(reason, "yes" if units == "all" else f"*{units}*"))
        for layout in _LAYOUTS:
            engine = vllm(family.model_type, layout)
            reason = f"vLLM: {engine.how}" if engine.loads == "no" else None
            cells.append(cell(reason, engine.loads))
        rows.append(f"| `{family.model_type}` | {' | '.join(cells)} |")
    header = [f"| family | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return _FAMILIES + "\n".join([*header, *rows, "", *notes, ""])


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
    parser.add_argument("--families", action="store_true", help="what each family can become")
    chosen = parser.parse_args(arguments)
    readme = chosen.readme
    if chosen.families:
        print(families(), end="")
    elif readme is None:
        print(page(), end="")
    else:
        readme.write_text(with_table(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()

"""The results of `spp diagnose` and `spp show` for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from spp_cli.render import sections
from spp_cli.render.look import BAD, FAINT, GOOD, STRONG, Look, byte_size, single_line

if TYPE_CHECKING:
    from spp_export.commands.report.report import ReportResult
    from spp_export.commands.show import Shown


def diagnosis_report(diagnosis: Mapping[str, Any], look: Look) -> RenderableType:
    """The mixture as bars and, where they are given, the probabilities of every layer."""
    lines: list[RenderableType] = [*sections.mixture(diagnosis, look)]
    if tokens := diagnosis.get("tokens"):
        lines += sections.tokens_read(tokens)
    if (held_out := diagnosis.get("held_out")) and (read := diagnosis.get("prompts")):
        words = f"read {read} of {read + held_out} prompts; an export holds the others out"
        lines.append(Text(words, style=FAINT))
    lines += sections.unknown_domain(diagnosis)
    if layers := diagnosis.get("layers"):
        lines += [Text(), _layer_table(layers)]
    return Group(*lines)


def _layer_table(layers: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style=FAINT)
    table.add_column("layer", justify="right")
    for domain in layers[0]["probability"]:
        table.add_column(single_line(domain), justify="right")
    for row in layers:
        values = row["probability"].values()
        table.add_row(str(row["layer"]), *(f"{value:.3f}" for value in values))
    return table


def shown_report(shown: Shown, look: Look) -> RenderableType:
    """Kind, facts and problems."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style=FAINT, no_wrap=True)
    table.add_column(overflow="fold")
    apart = {"axes", "record", *_PARTS}
    for name, value in shown.facts.items():
        if name not in apart:
            table.add_row(name.replace("_", " "), _value(value))
    lines: list[RenderableType] = [Text(shown.kind, style=STRONG), table]
    if record := shown.facts.get("record"):
        lines += [Text(), *map(Text, record)]
    for name in _PARTS:
        if rows := shown.facts.get(name):
            lines += [Text(), Text(name.replace("_", " "), style=FAINT), _part_table(rows)]
    if axes := shown.facts.get("axes"):
        lines += [Text(), *sections.domain_axes(axes, look)]
    if shown.problems is not None:
        lines.append(Text())
        lines += [Text(single_line(problem), style=BAD) for problem in shown.problems]
    if shown.problems == ():
        lines.append(Text("every file is as the manifest lists it", style=GOOD))
    return Group(*lines)


# Facts about a model that are a table each.
_PARTS = ("can_go", "stays", "can_become")


def _part_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style=FAINT)
    for name, value in rows[0].items():
        numbers = type(value) is int
        table.add_column(name.replace("_", " "), justify="right" if numbers else "left")
    for row in rows:
        table.add_row(*(_value(value) for value in row.values()))
    return table


def written_page(result: ReportResult, look: Look) -> RenderableType:
    """Where the page is, and which of its sections have nothing to show yet."""
    size = byte_size(result.bytes)
    lines = [Text(f"{look.arrow} {single_line(result.path)}, {size}", style=STRONG)]
    lines.append(Text(f"sections: {', '.join(result.sections)}"))
    if result.missing:
        missing = ", ".join(result.missing)
        lines.append(Text(f"nothing yet: {missing}; the page says what adds it", style=FAINT))
    return Group(*lines)


def _value(value: Any) -> str:
    """A JSON value in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{single_line(key)} {_value(item)}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(_value(item) for item in value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "all"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else single_line(value)

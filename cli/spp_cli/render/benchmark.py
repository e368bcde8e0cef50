"""The results of `spp bench` for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from spp_bench import profile
from spp_bench.report import Panel, panels, summary
from spp_cli.render.look import BAD, FAINT, STRONG, single_line


def benchmark_report(document: Mapping[str, Any]) -> RenderableType:
    """A table per phase and cell, memory, and what was published beside what is measured."""
    return _report(summary(document), panels(document))


def profile_report(document: Mapping[str, Any]) -> RenderableType:
    """The times of blocks of every size."""
    return _report(profile.title(document), profile.panels(document))


def _report(first: str, tables: Iterable[Panel]) -> RenderableType:
    lines: list[RenderableType] = [Text(single_line(first), style=FAINT)]
    for panel in tables:
        lines += [Text(), Text(panel.title, style=STRONG), _table(panel)]
    return Group(*lines)


def _table(panel: Panel) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style=FAINT)
    for index, name in enumerate(panel.head):
        table.add_column(name, justify="left" if index in panel.text else "right")
    for index, row in enumerate(panel.rows):
        table.add_row(*map(single_line, row), style=BAD if index in panel.wrong else "")
    return table

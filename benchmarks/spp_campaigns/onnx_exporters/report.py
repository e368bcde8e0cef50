"""The rows as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_COLUMNS = (
    ("export s", "{seconds:.1f}"),
    ("peak MB", "{peak_mb:.0f}"),
    ("file MB", "{file_mb:.0f}"),
    ("nodes", "{nodes}"),
    ("ms ops", "{microsoft_ops}"),
    ("batch", "{batch}"),
    ("diff prompt", "{prefill_diff:.1e}"),
    ("diff decode", "{decode_diff:.1e}"),
    ("prompt ms", "{prefill_median_ms:.0f} ({prefill_p20_ms:.0f}-{prefill_p80_ms:.0f})"),
    ("ms/token", "{decode_median_ms:.1f} ({decode_p20_ms:.1f}-{decode_p80_ms:.1f})"),
)


def report(document: Mapping[str, Any]) -> RenderableType:
    """Machine, table, and below it a line for everything that failed."""
    machine = " ".join(f"{name}: {value}" for name, value in document["machine"].items())
    workload = ", ".join(f"{name} {value}" for name, value in document["workload"].items())
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("", no_wrap=True)
    for title, _ in _COLUMNS:
        table.add_column(title, justify="right", no_wrap=True)
    notes = []
    for row in document["rows"]:
        table.add_row(row["name"], *(_cell(form, row) for _, form in _COLUMNS))
        if "error" in row:
            notes.append(Text(f"{row['name']}: {row['error']}", style="red"))
        elif row.get("shared_kv", "yes") != "yes":
            notes.append(Text(f"{row['name']}: shared KV: {row['shared_kv']}", style="dim"))
    return Group(Text(machine, style="dim"), Text(workload, style="dim"), table, *notes)


def _cell(form: str, row: Mapping[str, Any]) -> str:
    try:
        return form.format_map(row)
    except KeyError:
        return ""

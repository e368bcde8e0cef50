"""The results of `spp doctor` for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from spp_cli.render.look import BAD, FAINT, GOOD, STRONG, Look, byte_size, single_line

if TYPE_CHECKING:
    from spp_export.commands.doctor import Examination, Job


def examination_report(examination: Examination, look: Look) -> RenderableType:
    """Versions, devices, caches, engines and what is wrong."""
    versions = [[name, text] for name, text in examination.versions.items()]
    devices = [
        [
            device["device"],
            single_line(device["name"]),
            f"{byte_size(device['free_bytes'])} of {byte_size(device['bytes'])} free",
        ]
        for device in examination.devices
    ]
    caches = [
        [cache.name, byte_size(cache.nbytes), single_line(cache.path)]
        for cache in examination.caches
    ]
    parts = [
        [part.library.package, part.version or "-", part.library.use]
        if part.version
        else [part.library.package, "-", f"{part.library.use}: {part.library.install}"]
        for part in examination.parts
    ]
    lines: list[RenderableType] = []
    for name, rows in (
        ("versions", versions),
        ("devices", devices),
        ("caches", caches),
        ("engines and extras", parts),
    ):
        lines += [Text(name, style=STRONG), _table(rows), Text()]
    jobs = [[Text(job.what), *_possible(job)] for job in examination.jobs]
    lines += [Text("what commands can do here", style=STRONG), _table(jobs), Text()]
    if not examination.problems:
        return Group(*lines, Text("nothing stands in the way", style=GOOD))
    return Group(
        *lines, *(Text(single_line(problem), style=BAD) for problem in examination.problems)
    )


def _possible(job: Job) -> list[Text]:
    if job.works:
        return [Text("yes", style=GOOD), Text()]
    return [
        Text("no", style=BAD),
        Text(f"needs {', '.join(job.missing)}: {'; '.join(job.install)}"),
    ]


def _table(rows: Sequence[Sequence[str | Text]]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(style=FAINT, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table

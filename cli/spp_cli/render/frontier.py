"""The plans of a frontier, for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from spp_cli.render.look import FAINT, STRONG, byte_size, single_line

if TYPE_CHECKING:
    from spp_export.commands.frontier import FrontierResult


def frontier_table(result: FrontierResult) -> RenderableType:
    """A line for each plan, the one at the knee marked."""
    table = Table(box=None, padding=(0, 3, 0, 0), header_style=FAINT)
    measured = [f"{speed.speedup['median']:.2f}x" for speed in result.speeds if speed]
    speed = ("decode at best", "measured") if measured else ("decode at best",)
    for name in ("kept", "parameters", "on disk", *speed, "mean KL", "same token", ""):
        table.add_column(name, justify="right" if name else "left")
    for place, plan in enumerate(result.plans):
        sizes, quality, knee = plan.result.predicted, plan.quality, plan is result.knee
        interval = quality.intervals.get("mean_kl")
        spread = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
        table.add_row(
            f"{plan.keep:.0%}",
            f"{sizes.parameters:,}",
            byte_size(sizes.file_bytes),
            f"{sizes.decode[0].speedup:.2f}x",
            *measured[place : place + 1],
            f"{quality.mean_kl:.3f}{spread}",
            f"{quality.top1:.1%}",
            Text("knee", style=STRONG) if knee else "",
        )
    quality = result.knee.quality
    read = f"{quality.tokens:,} tokens: {single_line(quality.source)}; 95 % intervals in brackets"
    return Group(table, Text(), Text(read, style=FAINT), Text(f"in {result.path}", style=FAINT))

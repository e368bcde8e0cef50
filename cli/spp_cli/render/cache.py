"""The contents of the cache, for a terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from spp_cli.render.look import FAINT, STRONG, Look, byte_size, single_line

if TYPE_CHECKING:
    from spp_export.calibration.stored import CachedFile
    from spp_export.commands.cache import CacheContents

_DAY_S = 86400


def cache_list(contents: CacheContents, look: Look) -> RenderableType:
    """Files by model and kind, what was removed, and the limit."""
    total = sum(file.nbytes for file in contents.files)
    where = Text(single_line(str(contents.directory)), style=STRONG)
    where.append(f"   {byte_size(total)}, limit {byte_size(contents.limit)} besides models")
    lines: list[RenderableType] = [where]
    if contents.files:
        lines += [Text(), _table(contents.files)]
    for files, words in ((contents.removed, "removed"), (contents.in_use, "in use, not removed")):
        if files:
            size = byte_size(sum(file.nbytes for file in files))
            lines += [Text(), Text(f"{words}: {len(files)} files, {size}")]
    return Group(*lines)


def _table(files: Sequence[CachedFile]) -> Table:
    table = Table(box=None, padding=(0, 3, 0, 0), header_style=FAINT)
    for name in ("model", "what", "files", "size", "last used"):
        table.add_column(name, justify="right" if name in {"files", "size"} else "left")
    now = time.time()
    ordered = sorted(files, key=lambda file: (file.model, file.kind))
    for (model, kind), group in groupby(ordered, key=lambda file: (file.model, file.kind)):
        some = list(group)
        days = int((now - max(file.used for file in some)) // _DAY_S)
        used = {0: "today", 1: "yesterday"}.get(days, f"{days} days ago")
        size = byte_size(sum(file.nbytes for file in some))
        table.add_row(single_line(model) or "not named", kind, str(len(some)), size, used)
    return table

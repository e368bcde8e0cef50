"""Which heads stay, as a picture: one column per layer, one row per query head or KV group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from string import ascii_lowercase, digits
from typing import TYPE_CHECKING

from rich.text import Text

from spp_cli.render.look import FAINT, KEPT, Look

if TYPE_CHECKING:
    from spp_export.models.shape import ModelShape
    from spp_export.planning import LayerPlan

# More rows than this and the picture shows KV groups, each with its count of kept heads.
MOST_HEAD_ROWS = 16
LABEL_WIDTH = 4
_COUNTS = digits + ascii_lowercase


def head_map(layers: Sequence[LayerPlan], shape: ModelShape, look: Look, cell: int) -> list[Text]:
    """Lines of the map, `cell` characters per layer, in as many blocks as the width needs."""
    per_block = max((look.width - LABEL_WIDTH) // cell, 1)
    lines: list[Text] = []
    for start in range(0, len(layers), per_block):
        block = layers[start : start + per_block]
        lines.append(_axis(start, len(block), cell))
        lines += _rows(block, shape, look, cell)
    return lines


def _rows(layers: Sequence[LayerPlan], shape: ModelShape, look: Look, cell: int) -> list[Text]:
    if shape.query_heads > MOST_HEAD_ROWS:
        return [_group_row(group, layers, shape, look, cell) for group in range(shape.kv_heads)]
    lines = []
    for head in range(shape.query_heads):
        if head and head % shape.group_size == 0 and shape.group_size > 1:
            rule = look.line * (cell * len(layers))
            lines.append(Text(" " * LABEL_WIDTH + rule, style=FAINT))
        lines.append(_head_row(head, layers, shape, look, cell))
    return lines


def _axis(start: int, count: int, cell: int) -> Text:
    """Numbers of every fifth layer, above its column."""
    axis = [" "] * (LABEL_WIDTH + cell * count + 3)
    for layer in range(start, start + count):
        if layer % 5 == 0:
            at = LABEL_WIDTH + cell * (layer - start)
            axis[at : at + len(str(layer))] = str(layer)
    return Text("".join(axis).rstrip(), style=FAINT)


def _head_row(
    head: int, layers: Sequence[LayerPlan], shape: ModelShape, look: Look, cell: int
) -> Text:
    row = Text(f"{head:>{LABEL_WIDTH - 1}} ", style="")
    for layer in layers:
        if head in layer.query_heads:
            row.append(look.block * cell, style=KEPT)
        elif not layer.query_heads:  # it has another mixer, or none is kept
            row.append(" " * cell)
        else:
            gone = head // shape.group_size not in layer.kv_heads
            row.append(look.dot.ljust(cell), style=FAINT if gone else "")
    return row


def _group_row(
    group: int, layers: Sequence[LayerPlan], shape: ModelShape, look: Look, cell: int
) -> Text:
    row = Text(f"{group:>{LABEL_WIDTH - 1}} ", style="")
    for layer in layers:
        kept = Counter(head // shape.group_size for head in layer.query_heads)[group]
        none = look.dot if layer.query_heads else " "
        mark = none if kept == 0 else _COUNTS[min(kept, len(_COUNTS) - 1)]
        row.append(mark.ljust(cell), style=KEPT if kept else FAINT)
    return row

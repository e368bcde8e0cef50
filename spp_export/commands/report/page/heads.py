"""The head map: a column per layer, a row per query head, a gap between KV groups."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from spp_export.commands.report.page.figures import count, figure, nth, ranges
from spp_export.commands.report.page.markup import Html, joined, tag
from spp_export.commands.report.page.record import Heads

_GAP, _GROUP_GAP = 3, 7
KEPT, REMOVED, GROUP_REMOVED = "kept", "removed", "gone"
_STATES = {
    KEPT: "kept",
    REMOVED: "removed; its KV group stays",
    GROUP_REMOVED: "removed with its whole KV group",
}


def state(heads: Heads, layer: int, head: int) -> str:
    """What became of a head: KEPT, REMOVED or GROUP_REMOVED."""
    kept = heads.layers[layer]
    if head in kept.query_heads:
        return KEPT
    return REMOVED if head // heads.group_size in kept.kv_heads else GROUP_REMOVED


def head_map(heads: Heads) -> Html:
    """The picture, with a name for every cell: where it is, what became of it, its score."""
    axis = LayerAxis(len(heads.layers))
    rows = [_row(heads, axis, head) for head in range(heads.query_heads)]
    height = _y(heads, axis, heads.query_heads - 1) + axis.cell + 2
    picture = tag(
        "svg",
        _hatch(),
        axis.numbers(),
        _groups(heads, axis),
        joined(rows),
        viewBox=f"0 0 {axis.width} {height}",
        width=axis.width,
        height=height,
        role="grid",
        aria_label=f"Heads that stay, {len(heads.layers)} layers across and "
        f"{heads.query_heads} query heads down. Arrow keys move.",
        class_="marks map",
    )
    return tag("div", picture, class_="scroll", tabindex="0", role="region", aria_label="Head map")


def legend(heads: Heads) -> Html:
    """What the cells mean, and how many there are of each."""
    groups = heads.kv_heads * len(heads.layers)
    every = [state(heads, i, h) for i in range(len(heads.layers)) for h in range(heads.query_heads)]
    names = {
        KEPT: "kept",
        REMOVED: "removed",
        GROUP_REMOVED: "removed with its KV group",
    }
    items = [
        tag("li", _swatch(kind), f"{name} ", tag("b", count(every.count(kind))))
        for kind, name in names.items()
    ]
    counts = tag(
        "li", "KV groups kept ", tag("b", f"{count(heads.kept_groups)} of {count(groups)}")
    )
    return tag("ul", *items, counts, class_="legend")


def layer_rows(heads: Heads) -> Iterator[tuple[str, ...]]:
    """Per layer: its number, kept query heads, kept KV groups."""
    for index, layer in enumerate(heads.layers):
        yield (
            str(index),
            f"{len(layer.query_heads)} of {heads.query_heads}",
            ranges(layer.query_heads),
            ranges(layer.kv_heads),
        )


def _row(heads: Heads, axis: LayerAxis, head: int) -> Html:
    y = _y(heads, axis, head)
    name = tag(
        "text",
        str(head),
        x=LEFT - 8,
        y=y + axis.cell / 2 + 4,
        class_="axis",
        text_anchor="end",
        role="rowheader",
        aria_label=f"Query head {head}",
    )
    cells = (_cell(heads, axis, layer, head, y) for layer in range(len(heads.layers)))
    return tag("g", name, joined(cells), role="row")


def _cell(heads: Heads, axis: LayerAxis, layer: int, head: int, y: float) -> Html:
    found = state(heads, layer, head)
    side = axis.cell - _GAP
    # A frame is drawn around the middle of its line: half a pixel in, it is sharp.
    return tag(
        "rect",
        tag("title", _title(heads, layer, head, found)),
        x=axis.x(layer) + 1.5,
        y=y + 1.5,
        width=side,
        height=side,
        rx=min(3, side // 4),
        class_=found,
        role="gridcell",
        tabindex="0" if layer == head == 0 else "-1",
    )


def _title(heads: Heads, layer: int, head: int, found: str) -> str:
    lines = [f"Layer {layer}, query head {head}", f"KV group {head // heads.group_size}"]
    lines[1] += f", {_STATES[found]}"
    if heads.scores:
        row = heads.scores.values[layer]
        rank = 1 + sum(score > row[head] for score in row)
        lines.append(
            f"{heads.scores.name} {figure(row[head])}, {nth(rank)} of {len(row)} in its layer"
        )
    return "\n".join(lines)


def _y(heads: Heads, axis: LayerAxis, head: int) -> int:
    return TOP + axis.cell * head + _GROUP_GAP * (head // heads.group_size)


def _groups(heads: Heads, axis: LayerAxis) -> Html:
    """Names of KV groups at their sides, where a group has more than one head."""
    if heads.group_size == 1:
        return Html()
    names = []
    for group in range(heads.kv_heads):
        first = _y(heads, axis, group * heads.group_size)
        middle = first + axis.cell * heads.group_size / 2
        names.append(
            tag(
                "text",
                f"KV {group}",
                x=0,
                y=0,
                class_="axis group",
                text_anchor="middle",
                transform=f"translate(12 {middle:g}) rotate(-90)",
            )
        )
    return joined(names)


def _hatch() -> Html:
    stripe = tag("path", d="M-1.5 1.5 1.5 -1.5M0 6 6 0M4.5 7.5 7.5 4.5", class_="stripe")
    pattern = tag("pattern", stripe, id="hatch", width=6, height=6, patternUnits="userSpaceOnUse")
    return tag("defs", pattern)


def _swatch(kind: str) -> Html:
    cell = tag("rect", x="1.5", y="1.5", width="13", height="13", rx="3", class_=kind)
    return tag("svg", cell, class_="swatch map", viewBox="0 0 16 16", aria_hidden="true")


_WIDEST, _NARROWEST, _ROOM = 32, 11, 980


# Room on the left for numbers of heads and names of KV groups.
LEFT, TOP = 54, 20


@dataclass(frozen=True)
class LayerAxis:
    """Columns of `cell` pixels, one per layer."""

    layers: int

    @property
    def cell(self) -> int:
        """Width of a column: what fits the page, within reason."""
        return min(max(_ROOM // self.layers, _NARROWEST), _WIDEST)

    @property
    def width(self) -> int:
        """Of the whole picture."""
        return LEFT + self.cell * self.layers + 2

    def x(self, layer: int) -> int:
        """Left edge of a layer's column."""
        return LEFT + self.cell * layer

    def numbers(self) -> Html:
        """Every fifth layer's number above its column; every tenth of narrow ones."""
        every = 5 if self.cell >= 14 else 10
        return joined(
            tag(
                "text",
                str(layer),
                x=self.x(layer) + self.cell / 2,
                y=TOP - 8,
                class_="axis",
                text_anchor="middle",
            )
            for layer in range(0, self.layers, every)
        )

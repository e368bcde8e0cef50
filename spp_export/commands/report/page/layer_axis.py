"""What pictures with one column per layer share: where columns lie, and their numbers."""

from __future__ import annotations

from dataclasses import dataclass

from spp_export.commands.report.page.markup import Html, joined, tag

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

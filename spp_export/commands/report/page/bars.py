"""Bars: shares of domains, sizes before and after, channels of layers."""

from __future__ import annotations

from collections.abc import Sequence

from spp_export.commands.report.page.figures import byte_size, change, count, percent
from spp_export.commands.report.page.heads import LEFT, TOP, LayerAxis
from spp_export.commands.report.page.markup import Html, joined, tag
from spp_export.commands.report.page.record import Channels, Saving

_HEIGHT = 96


def share_bars(shares: Sequence[tuple[str, float]]) -> Html:
    """A bar per name, as long as its share of one."""
    rows = [
        tag(
            "li",
            tag("span", name, class_="name"),
            _bar(share, "fill"),
            tag("span", percent(share), class_="value"),
        )
        for name, share in shares
    ]
    return tag("ul", *rows, class_="bars")


def saving_rows(sizes: Sequence[Saving]) -> Html:
    """A table of sizes before and after, with a bar of what is left."""
    head = tag(
        "tr",
        *(tag("th", name, scope="col") for name in ("", "dense", "slim")),
        tag("th", "left", scope="col", class_="wide"),
        tag("th", "change", scope="col"),
    )
    rows = [
        tag(
            "tr",
            tag("th", size.name, scope="row"),
            tag("td", _amount(size.dense, size)),
            tag("td", _amount(size.slim, size)),
            tag("td", _bar(size.slim / size.dense if size.dense else 0, "fill"), class_="wide"),
            tag("td", change(size.dense, size.slim)),
        )
        for size in sizes
    ]
    body = tag("table", tag("thead", head), tag("tbody", *rows), class_="figures sizes")
    return tag("div", body, class_="scroll", tabindex="0", role="region", aria_label="Sizes")


def channel_bars(channels: Channels) -> Html:
    """A column per layer, under those of the head map: as high as the share of channels kept."""
    axis = LayerAxis(len(channels.kept))
    columns = [
        _column(axis, index, kept, channels.dense) for index, kept in enumerate(channels.kept)
    ]
    lines = [
        tag("line", x1=LEFT, x2=axis.width, y1=y, y2=y, class_="grid")
        for y in (TOP, TOP + _HEIGHT / 2, TOP + _HEIGHT)
    ]
    labels = [
        tag("text", text, x=LEFT - 8, y=y + 4, class_="axis", text_anchor="end")
        for text, y in ((count(channels.dense), TOP), ("0", TOP + _HEIGHT))
    ]
    height = TOP + _HEIGHT + 6
    picture = tag(
        "svg",
        axis.numbers(),
        *lines,
        *labels,
        tag("g", *columns, role="row"),
        viewBox=f"0 0 {axis.width} {height}",
        width=axis.width,
        height=height,
        role="grid",
        aria_label="MLP channels kept, a bar per layer. Arrow keys move.",
        class_="marks map",
    )
    label = "Channels per layer"
    return tag("div", picture, class_="scroll", tabindex="0", role="region", aria_label=label)


def _column(axis: LayerAxis, layer: int, kept: int, dense: int) -> Html:
    high = _HEIGHT * kept / dense
    text = f"Layer {layer}\n{count(kept)} of {count(dense)} channels, {percent(kept / dense)}"
    return tag(
        "rect",
        tag("title", text),
        x=axis.x(layer) + 1.5,
        y=round(TOP + _HEIGHT - high, 2),
        width=axis.cell - 3,
        height=round(high, 2),
        class_="kept",
        role="gridcell",
        tabindex="0" if layer == 0 else "-1",
    )


def _bar(share: float, class_: str) -> Html:
    width = f"{100 * min(max(share, 0.0), 1.0):.1f}%"
    parts = [
        tag("rect", width="100%", height="10", rx="3", class_="track"),
        tag("rect", width=width, height="10", rx="3", class_=class_),
    ]
    return tag("svg", joined(parts), class_="bar", height="10", width="100%", aria_hidden="true")


def _amount(value: float, size: Saving) -> str:
    return byte_size(value) if size.is_bytes else count(value)

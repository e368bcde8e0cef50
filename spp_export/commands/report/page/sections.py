"""The page's sections: each takes its part of the record and gives its markup."""

from __future__ import annotations

from collections.abc import Sequence

from spp_export.commands.report.page.bars import channel_bars, saving_rows, share_bars
from spp_export.commands.report.page.curves import chart_figure
from spp_export.commands.report.page.figures import count, figure
from spp_export.commands.report.page.heads import head_map, layer_rows, legend
from spp_export.commands.report.page.markup import Html, tag
from spp_export.commands.report.page.record import (
    Benchmark,
    Channels,
    Chart,
    Check,
    Checks,
    Fact,
    Heads,
    Hint,
    Mixture,
    Quality,
    Report,
    Savings,
    Table,
    Tile,
)
from spp_export.commands.report.page.spreads import spread_figure, spread_legend


def section(name: str, title: str, *inner: str) -> Html:
    """A section of the page under its own id."""
    heading = tag("h2", title, id=f"{name}-title")
    return tag("section", heading, *inner, id=name, aria_labelledby=f"{name}-title")


def header(report: Report) -> Html:
    """Title, the one sentence, and the figures that matter most."""
    tiles = tag("ul", *map(_tile, report.tiles), class_="tiles") if report.tiles else ""
    kind = tag("p", report.kind, class_="kind")
    lead = tag("p", report.summary, class_="lead")
    return tag("header", kind, tag("h1", report.title), lead, tiles)


def mixture(part: Mixture | Hint) -> Html:
    """What the scenario is about."""
    if isinstance(part, Hint):
        return section("mixture", "Domains of the scenario", _hint(part))
    return section(
        "mixture", "Domains of the scenario", share_bars(part.shares), *_notes(part.notes)
    )


def savings(part: Savings | Hint) -> Html:
    """Sizes before and after."""
    if isinstance(part, Hint):
        return section("savings", "Savings", _hint(part))
    bounds = figures_table(part.bounds, "Bounds") if part.bounds else ""
    return section("savings", "Savings", saving_rows(part.sizes), bounds, *_notes(part.notes))


def heads(part: Heads) -> Html:
    """The head map with its legend and its numbers."""
    scores = part.scores.note if part.scores else part.unscored
    names = ("layer", "query heads", "which", "KV groups")
    table = Table(names, tuple(layer_rows(part)), frozenset({2, 3}))
    return section(
        "heads",
        "Heads by layer",
        legend(part),
        head_map(part),
        *_notes([note for note in (part.note, scores) if note]),
        unfolding("Heads of every layer", figures_table(table, "Heads of every layer")),
    )


def channels(part: Channels) -> Html:
    """MLP channels, layer by layer."""
    whole = part.dense * len(part.kept)
    note = f"{count(sum(part.kept))} of {count(whole)} MLP channels stay."
    rows = tuple((str(i), count(kept), count(part.dense)) for i, kept in enumerate(part.kept))
    table = figures_table(Table(("layer", "kept", "of"), rows, frozenset()), "Channels")
    picture = channel_bars(part)
    return section(
        "channels", "Channels by layer", picture, *_notes([note]), unfolding("Channels", table)
    )


def checks(part: Checks | Hint) -> Html:
    """Parity and integrity."""
    title = "Checks"
    if isinstance(part, Hint):
        return section("checks", title, _hint(part))
    head = ("", "check", "found", "limit", "detail")
    names = tag("tr", *(tag("th", n, scope="col", class_=_text_column(n)) for n in head))
    body = tag("table", tag("thead", names), tag("tbody", *map(_check_row, part.checks)))
    table = tag("div", body, class_="scroll checks", tabindex="0", role="region", aria_label=title)
    return section("checks", title, table, *_notes(part.notes))


def quality(part: Quality | Hint) -> Html:
    """Figures on held-out text, and curves of an evaluation."""
    if isinstance(part, Hint):
        return section("quality", "Quality", _hint(part))
    more = [unfolding("Other units and compensations", _charts(part.more, "more"))]
    return section(
        "quality",
        "Quality",
        fact_list(part.figures) if part.figures else "",
        _charts(part.charts, "quality") if part.charts else "",
        *(more if part.more else []),
        *_notes(part.notes),
        _hint(part.hint) if part.hint else "",
    )


def benchmark(part: Benchmark | Hint) -> Html:
    """Speed and memory with their bounds."""
    if isinstance(part, Hint):
        return section("benchmark", "Speed and memory", _hint(part))
    warned = [tag("p", text, class_="bad") for text in part.problems]
    tables = [(title, figures_table(table, title)) for title, table in part.tables]
    spreads = [spread_figure(title, rows) for title, rows in part.spreads]
    return section(
        "benchmark",
        "Speed and memory",
        *warned,
        *([tag("div", *spreads, class_="charts"), spread_legend()] if spreads else []),
        _charts(part.charts, "benchmark") if part.charts else "",
        # Under curves they are long, and say the same.
        *(
            unfolding(title, table) if part.charts else tag("div", tag("h3", title), table)
            for title, table in tables
        ),
        *_notes(part.notes),
    )


def engines(report: Report) -> Html:
    """Who loads it."""
    rows = tuple((engine.name, engine.loads, engine.how) for engine in report.engines)
    table = Table(("engine", "loads it", "how"), rows, frozenset({0, 1, 2}))
    note = "yes: a test of spp loads and runs it. expected: not run by us. no: known not to."
    return section("engines", "Engines", figures_table(table, "Engines"), *_notes([note]))


def provenance(report: Report) -> Html:
    """Where every byte comes from."""
    parts = [fact_list(report.provenance)]
    if report.versions:
        rows = tuple(report.versions.items())
        table = Table(("library", "version"), rows, frozenset({0, 1}))
        parts.append(unfolding("Versions", figures_table(table, "Versions")))
    if report.files:
        parts.append(unfolding("Files and hashes", figures_table(report.files, "Files")))
    return section("provenance", "Provenance", *parts)


def _tile(tile: Tile) -> Html:
    kind = {True: "good", False: "bad", None: None}[tile.good]
    return tag(
        "li",
        tag("span", tile.label, class_="label"),
        tag("span", tile.value, class_="figure"),
        tag("span", tile.note, class_="note"),
        class_=kind,
    )


def _check_row(check: Check) -> Html:
    mark = "passed" if check.passed else "FAILED"
    return tag(
        "tr",
        tag("td", mark, class_=f"text {'good' if check.passed else 'bad'}"),
        tag("th", check.name, scope="row", class_="text"),
        tag("td", "" if check.found is None else figure(check.found), data_label="found"),
        tag("td", "" if check.limit is None else figure(check.limit), data_label="limit"),
        tag("td", check.detail, class_="text detail"),
    )


def _text_column(name: str) -> str | None:
    return None if name in ("found", "limit") else "text"


def _charts(charts: Sequence[Chart], name: str) -> Html:
    figures = (chart_figure(chart, f"{name}-{index}") for index, chart in enumerate(charts))
    return tag("div", *figures, class_="charts")


def _notes(notes: Sequence[str]) -> list[Html]:
    return [tag("p", note, class_="note") for note in notes]


def _hint(hint: Hint) -> Html:
    command = tag("pre", tag("code", hint.command)) if hint.command else ""
    return tag("div", tag("p", hint.text), command, class_="hint")


def figures_table(table: Table, label: str) -> Html:
    """A table that scrolls inside its own box where it is wider than the page."""
    head = [
        tag("th", name, scope="col", class_=_class(table, index))
        for index, name in enumerate(table.head)
    ]
    rows = [tag("tr", *(_cell(table, i, cell) for i, cell in enumerate(row))) for row in table.rows]
    body = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *rows), class_="figures")
    return tag("div", body, class_="scroll", tabindex="0", role="region", aria_label=label)


def fact_list(facts: Sequence[Fact]) -> Html:
    """Names and values, one pair a line."""
    pairs = [
        tag(
            "div",
            tag("dt", fact.name),
            tag("dd", tag("code", fact.value) if fact.code else fact.value),
        )
        for fact in facts
    ]
    return tag("dl", *pairs, class_="facts")


def unfolding(title: str, *inner: Html) -> Html:
    """What is shown when asked for."""
    return tag("details", tag("summary", title), *inner)


def _cell(table: Table, index: int, text: str) -> Html:
    if index == 0:
        return tag("th", text, scope="row", class_=_class(table, index))
    return tag("td", text, class_=_class(table, index))


def _class(table: Table, index: int) -> str | None:
    return "text" if index in table.text else None

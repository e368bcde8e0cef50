"""Results of `spp eval` with budgets side by side: `python -m spp_campaigns.quality_tables DIR`.

`table.md` of a results directory has one table per budget; these have one per choice of units and
compensation, with a column per budget, as on the results page. Where answers were judged, KL to the
dense model and the rate of the same likeliest token come first, and perplexity second.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spp_export.evaluation.bootstrap import Interval, paired_kl, paired_ratio
from spp_export.evaluation.harness.records import Record, Results, read_results
from spp_export.evaluation.harness.rows import Row
from spp_export.evaluation.harness.table import Ranked, interval, notes, ranking, units_name


@dataclass(frozen=True)
class Measure:
    """A figure of a row, what a table calls it, and whether the best have least of it."""

    title: str
    of: Callable[[Ranked], Interval | None]
    digits: int = 3
    least: bool = True


def measures(results: Results, text: str) -> list[Measure]:
    """What tables show of a text: of answers all that was measured, else perplexity."""
    perplexity = Measure("perplexity over dense", lambda ranked: ranked.ratio[text])
    if not (results.on_answers and text == results.judge):
        return [perplexity]
    return [
        Measure("KL to the dense model in nats", lambda ranked: ranked.kl),
        Measure(
            "share of tokens that both find likeliest", lambda ranked: ranked.top1, least=False
        ),
        Measure(
            "greedy tokens before the first difference",
            lambda ranked: ranked.greedy,
            digits=1,
            least=False,
        ),
        perplexity,
    ]


def tables(results: Results, text: str) -> Iterator[str]:
    """Markdown tables of a text: of the dense model in fewer bits, then for each measure one per
    choice of units and compensation."""
    shown = measures(results, text)
    ranked = [row for rows in ranking(results).values() for row in rows]
    if whole := [row for row in ranked if row.row.kind == "yardstick"]:
        yield _whole_table(whole, shown, text)
    for measure in shown:
        panels: dict[tuple[str, str], dict[Row, dict[float, Interval]]] = {}
        for row in ranked:
            if not row.row.whole and (figure := measure.of(row)):
                panel = panels.setdefault((row.row.units, row.row.compensation), {})
                panel.setdefault(replace(row.row, keep=1.0), {})[row.row.keep] = figure
        for (units, compensation), panel in sorted(panels.items(), key=_panel_order):
            head = f"### {units_name(units).capitalize()}, compensation {compensation}"
            yield f"{head}: {measure.title}, {text}\n\n{_panel_table(panel, measure)}"


def _whole_table(rows: Sequence[Ranked], shown: Sequence[Measure], text: str) -> str:
    figures = [measure for measure in shown if any(measure.of(row) for row in rows)]
    lines = [f"### Nothing removed: the dense model in fewer bits, {text}", ""]
    head = ["", *(measure.title for measure in figures)]
    lines += [_line(head), "|" + "---|" * len(head)]
    for row in rows:
        cells = [_cell(measure.of(row), measure.digits) for measure in figures]
        lines.append(_line([row.row.label, *cells]))
    return "\n".join(lines)


def _panel_table(panel: dict[Row, dict[float, Interval]], measure: Measure) -> str:
    keeps = sorted({keep for way in panel.values() for keep in way}, reverse=True)
    # The budget at which most rows were measured; of several, the largest.
    common = max(keeps, key=lambda keep: sum(keep in way for way in panel.values()))
    head = ["chosen by", "", *(f"{1 - keep:.0%} removed" for keep in keeps)]
    lines = [_line(head), "|" + "---|" * len(head)]

    def order(item: tuple[Row, dict[float, Interval]]) -> float:
        figure = item[1].get(common)
        if figure is None:
            return float("inf")
        return figure.value if measure.least else -figure.value

    for row, way in sorted(panel.items(), key=order):
        cells = [_cell(way.get(keep), measure.digits) for keep in keeps]
        lines.append(_line([row.label, "" if row.kind == "method" else row.kind, *cells]))
    return "\n".join(lines)


def _cell(figure: Interval | None, digits: int) -> str:
    return "" if figure is None else interval(figure, digits)


def comparisons(results: Results, text: str) -> Iterator[str]:
    """The first criterion that has a domain-mean control, over its controls and ablations,
    paired."""
    measured = results.measured
    main = {record.row.criterion for record in measured if record.row.text == "mean"}
    by_kl = results.on_answers
    head = ["units", "removed", "comp.", "over", *(["KL less"] if by_kl else [])]
    rows = [[*head, f"perplexity ratio, {text}"]]
    for ours in measured:
        if ours.row.kind == "method" and ours.row.criterion in main and not ours.row.plan:
            for theirs in measured:
                if _alike(ours, theirs):
                    scores = results.scores(ours, text), results.scores(theirs, text)
                    rows.append(
                        [
                            ours.row.units,
                            f"{1 - ours.row.keep:.0%}",
                            ours.row.compensation,
                            theirs.row.label,
                            *([interval(paired_kl(*scores))] if by_kl else []),
                            interval(paired_ratio(*scores)),
                        ]
                    )
    head, *body = rows
    if body:
        yield "\n".join([_line(head), "|" + "---|" * len(head), *map(_line, body)])


def _alike(ours: Record, theirs: Record) -> bool:
    """Rows of the same criterion with another text, whitelist or artifacts."""
    same = replace(theirs.row, text=ours.row.text, whitelist=True, artifacts="", kind=ours.row.kind)
    return same == ours.row and theirs.row != ours.row


def _panel_order(item: tuple[tuple[str, str], object]) -> tuple[bool, bool, str]:
    """Heads before both, the re-fit before other compensations."""
    (units, compensation), _ = item
    return units != "heads", compensation != "lstsq", compensation


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables of a results directory in Markdown."""
    parser = argparse.ArgumentParser(prog="spp_campaigns.quality_tables", description=__doc__)
    parser.add_argument("results", type=Path, help="directory that `spp eval` wrote")
    parser.add_argument("--text", help="text to show; the one with most documents by default")
    options = parser.parse_args(arguments)
    results = read_results(options.results / "results.jsonl")
    text = options.text or results.judge
    said = "\n".join(f"- {note}" for note in notes(results))
    parts = [said] if said else []
    print("\n\n".join([*parts, *tables(results, text), *comparisons(results, text)]))


if __name__ == "__main__":
    main()

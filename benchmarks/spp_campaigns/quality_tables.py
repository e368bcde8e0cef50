"""Results of `spp eval` with budgets side by side: `python -m spp_campaigns.quality_tables DIR`.

`table.md` of a results directory has one table per budget; these have one per choice of units and
compensation, with a column per budget, as on the results page.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from spp_export.evaluation.bootstrap import Interval, paired_ratio
from spp_export.evaluation.harness.records import Record, Results, read_results
from spp_export.evaluation.harness.rows import Row
from spp_export.evaluation.harness.table import interval, ranking, units_name


def tables(results: Results, text: str) -> Iterator[str]:
    """One Markdown table per choice of units and compensation: perplexity over dense on `text`."""
    panels: dict[tuple[str, str], dict[Row, dict[float, Interval]]] = {}
    for (keep, units), rows in ranking(results).items():
        for ranked in rows:
            if ranked.row.kind != "dense":
                panel = panels.setdefault((units, ranked.row.compensation), {})
                way = panel.setdefault(replace(ranked.row, keep=1.0), {})
                way[keep] = ranked.ratio[text]
    for (units, compensation), panel in sorted(panels.items(), key=_panel_order):
        keeps = sorted({keep for way in panel.values() for keep in way}, reverse=True)
        # The budget at which most rows were measured; of several, the largest.
        common = max(keeps, key=lambda keep: sum(keep in way for way in panel.values()))
        lines = [f"### {units_name(units).capitalize()}, compensation {compensation}, {text}", ""]
        head = ["chosen by", "", *(f"{1 - keep:.0%} removed" for keep in keeps)]
        lines += [_line(head), "|" + "---|" * len(head)]
        for row, way in sorted(panel.items(), key=lambda item: _order(item[1], common)):
            cells = [interval(way[keep]) if keep in way else "" for keep in keeps]
            lines.append(_line([row.label, "" if row.kind == "method" else row.kind, *cells]))
        yield "\n".join(lines)


def comparisons(results: Results, text: str) -> Iterator[str]:
    """The first criterion that has a domain-mean control, over its controls and ablations,
    paired."""
    measured = results.measured
    main = {record.row.criterion for record in measured if record.row.text == "mean"}
    rows = [["units", "removed", "comp.", "over", f"ratio, {text}"]]
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
                            interval(paired_ratio(*scores)),
                        ]
                    )
    head, *body = rows
    yield "\n".join([_line(head), "|" + "---|" * len(head), *map(_line, body)])


def _alike(ours: Record, theirs: Record) -> bool:
    """Rows of the same criterion with another text, whitelist or artifacts."""
    same = replace(theirs.row, text=ours.row.text, whitelist=True, artifacts="", kind=ours.row.kind)
    return same == ours.row and theirs.row != ours.row


def _panel_order(item: tuple[tuple[str, str], object]) -> tuple[bool, bool, str]:
    """Heads before both, the re-fit before other compensations."""
    (units, compensation), _ = item
    return units != "heads", compensation != "lstsq", compensation


def _order(way: dict[float, Interval], keep: float) -> float:
    return way[keep].value if keep in way else float("inf")


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
    print("\n\n".join([*tables(results, text), *comparisons(results, text)]))


if __name__ == "__main__":
    main()

"""The results of `spp eval` for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from spp_cli.render.look import BAD, FAINT, GOOD, STRONG, Look, single_line
from spp_export.evaluation.harness.table import (
    PairedComparison,
    Ranked,
    amount_of,
    comparisons,
    interval,
    notes,
    ranking,
    units_name,
)

if TYPE_CHECKING:
    from spp_export.commands.evaluate import EvalResult
    from spp_export.evaluation.harness.records import Results

_VERDICTS = {"better": GOOD, "worse": BAD}
# Against these the first criterion has to prove itself; the page has all the others.
_SHOWN_AGAINST = ("control", "ablation")


def evaluation_report(result: EvalResult, look: Look) -> RenderableType:
    """Ranked rows per budget on the text that judges, what the controls say, and what failed."""
    results = result.results
    text = results.judge
    lines: list[RenderableType] = [_title(results, look)]
    for (keep, units), rows in ranking(results).items():
        title = "dense" if rows[0].row.whole else f"keep {keep:g} of {units_name(units)}"
        lines += [Text(), Text(title, style=STRONG), _ranked(rows, text)]
    shown = [pair for pair in comparisons(results) if pair.theirs.kind in _SHOWN_AGAINST]
    if shown:
        lines += [Text(), Text("against controls", style=STRONG), _compared(shown)]
    for note in notes(results):
        lines.append(Text(single_line(note), style=FAINT))
    for record in results.failed:
        where = f"{record.row.label}, keep {record.row.keep:g}: "
        lines.append(Text(single_line(f"{where}{record.error}"), style=BAD))
    lines += [Text(), Text(single_line(f"written to {result.directory}"), style=FAINT)]
    return Group(*lines)


def evaluation_reports(results: Sequence[EvalResult], look: Look) -> RenderableType:
    """The report of every scenario, one after the other."""
    return Group(
        *(part for result in results for part in (evaluation_report(result, look), Text()))
    )


def _title(results: Results, look: Look) -> Text:
    model, scenario = results.header["model"]["name"], results.header["scenario"]["name"]
    text = Text(single_line(f"{model} {look.arrow} {scenario}"), style=STRONG)
    judge = f"{results.judge}{amount_of(results, results.judge)}"
    return text.append(f"   beside dense, {single_line(judge)}", style=FAINT)


def _ranked(rows: Sequence[Ranked], text: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style=FAINT)
    for name, right in (("#", True), ("chosen by", False), ("", False), ("comp.", False)):
        table.add_column(name, justify="right" if right else "left")
    greedy = any(ranked.greedy for ranked in rows)
    for name in ("kept", "KL", "same token", *(["greedy"] if greedy else []), "perplexity x"):
        table.add_column(name, justify="right", no_wrap=True)
    for ranked in rows:
        cells = [
            str(ranked.rank),
            single_line(ranked.row.label),
            ranked.mark,
            ranked.row.compensation,
            "" if ranked.kept is None else f"{ranked.kept:.3f}",
            interval(ranked.kl),
            f"{ranked.top1.value:.1%}",
            *([f"{ranked.greedy.value:.1f}" if ranked.greedy else ""] if greedy else []),
            f"{ranked.ratio[text].value:.3f}",
        ]
        table.add_row(*cells, style=FAINT if ranked.mark else "")
    return table


def _compared(shown: Sequence[PairedComparison]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for pair in shown:
        how = f"{pair.ours.keep:g} of {units_name(pair.ours.units)}, {pair.ours.compensation}"
        names = f"{pair.ours.label} / {pair.theirs.label}"
        verdict = Text(pair.verdict, style=_VERDICTS.get(pair.verdict, FAINT))
        text = Text(single_line(pair.text), style=FAINT)
        figure = f"KL {interval(pair.kl)}" if pair.by_kl else interval(pair.ratio)
        table.add_row(how, single_line(names), text, figure, verdict)
    return table

"""Results as ranked rows and paired comparisons, and both as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from spp_export.evaluation.bootstrap import Interval, array, paired_ratio
from spp_export.evaluation.harness.records import Record, Results
from spp_export.evaluation.harness.rows import Row
from spp_export.evaluation.remarks import FEW_TOKENS

_MARKS = {
    "method": "",
    "control": "control",
    "ablation": "ablation",
    "dense": "",
    "dynamic": "not static",
}


@dataclass(frozen=True)
class Ranked:
    """A row among those of its budget and units; rank 1 has the lowest ratio on the text
    that judges."""

    rank: int
    row: Row
    kept: float | None
    perplexity: Mapping[str, float]
    ratio: Mapping[str, Interval]
    kl: Interval
    top1: Interval
    answers: Mapping[str, Mapping[str, Interval]]

    @property
    def mark(self) -> str:
        """What sets the row apart from a method, in a word."""
        return _MARKS[self.row.kind]


@dataclass(frozen=True)
class PairedComparison:
    """Perplexity of one row over another's on a text: below one where the first is better."""

    ours: Row
    theirs: Row
    text: str
    ratio: Interval

    @property
    def verdict(self) -> str:
        """better or worse beyond the interval, or neither."""
        if not self.ratio.differs_from_1:
            return "no difference beyond the interval"
        return "better" if self.ratio.high < 1 else "worse"


def ranking(results: Results) -> dict[tuple[float, str], list[Ranked]]:
    """Rows by (keep, units): most kept first, then in order of rank. The dense row is alone."""
    judge = results.judge
    groups: dict[tuple[float, str], list[Record]] = {}
    for record in results.measured:
        groups.setdefault((record.row.keep, record.row.units), []).append(record)
    ranked = {}
    for key in sorted(groups, key=lambda key: (-key[0], key[1])):
        ordered = sorted(groups[key], key=lambda record: _ratio_order(record, judge))
        ranked[key] = [
            _ranked(rank, record, results) for rank, record in enumerate(ordered, start=1)
        ]
    return ranked


def comparisons(results: Results, seed: int = 0) -> list[PairedComparison]:
    """Per budget, units and compensation, on every text: the criteria that have a domain-mean
    control, each against every other row, paired."""
    main = {record.row.criterion for record in results.measured if record.row.text == "mean"}
    pairs = []
    for ours in results.measured:
        if ours.row.kind != "method" or ours.row.plan or ours.row.criterion not in main:
            continue
        for theirs in results.measured:
            if theirs is ours or not _comparable(ours.row, theirs.row):
                continue
            for text in results.texts:
                scores = results.scores(ours, text), results.scores(theirs, text)
                pairs.append(
                    PairedComparison(ours.row, theirs.row, text, paired_ratio(*scores, seed))
                )
    return pairs


def markdown(results: Results) -> str:
    """The whole evaluation as a page: how it was made, the ranked tables, the comparisons."""
    parts = [_header(results)]
    for (keep, units), rows in ranking(results).items():
        title = "Dense" if rows[0].row.kind == "dense" else f"Keep {keep:g} of {units_name(units)}"
        parts.append(f"## {title}\n\n{_ranked_table(rows, results.texts)}")
        if rows[0].answers:
            parts.append(_answers_table(rows))
    if pairs := comparisons(results):
        parts.append(f"## Paired comparisons\n\n{_comparison_table(pairs)}")
    if results.failed:
        lines = [
            f"- {record.row.label}, keep {record.row.keep:g}: {record.error}"
            for record in results.failed
        ]
        parts.append("## Rows that could not be planned\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def units_name(units: str) -> str:
    """heads, channels or both, in words."""
    return "heads and channels" if units == "both" else units


def interval(figure: Interval, digits: int = 3) -> str:
    """value [low, high]; a dash for what is not known."""
    value = _figure(figure.value, digits)
    if math.isnan(figure.low) or figure.low == figure.high:
        return value
    return f"{value} [{_figure(figure.low, digits)}, {_figure(figure.high, digits)}]"


def _ratio_order(record: Record, text: str) -> float:
    value = record.data["texts"][text]["summary"]["ratio"][0]
    return math.inf if value is None else value


def _ranked(rank: int, record: Record, results: Results) -> Ranked:
    summaries = {text: record.data["texts"][text]["summary"] for text in results.texts}
    judged = summaries[results.judge]
    return Ranked(
        rank,
        record.row,
        record.data["realised"].get("keep"),
        {text: float(array([summary["perplexity"]])[0]) for text, summary in summaries.items()},
        {text: _read(summary["ratio"]) for text, summary in summaries.items()},
        _read(judged["kl"]),
        _read(judged["top1"]),
        {
            name: {figure: _read(values) for figure, values in summary["summary"].items()}
            for name, summary in record.data.get("answers", {}).items()
        },
    )


def _read(values: Sequence[float | None]) -> Interval:
    return Interval(*(float(value) for value in array(values)))


def _comparable(ours: Row, theirs: Row) -> bool:
    """The same budget; and the same compensation, unless the other can have none."""
    same = replace(theirs, compensation=ours.compensation) if theirs.kind == "dynamic" else theirs
    expected = (ours.keep, ours.units, ours.compensation)
    return (same.keep, same.units, same.compensation) == expected


def _header(results: Results) -> str:
    header = results.header
    lines = [
        f"# Evaluation of {header['model']['name']}",
        "",
        f"Scenario {header['scenario']['name']}; perplexity over the dense model's, with 95 % "
        "intervals by bootstrap over documents. Rank, KL and top-1 agreement are those on "
        f"{results.judge}.",
        "",
    ]
    lines += [
        f"- {name}: {text['documents']} documents{amount_of(results, name)}"
        for name, text in header["texts"].items()
    ]
    machine = ", ".join(f"{name} {value}" for name, value in header["machine"].items())
    return "\n".join([*lines, f"- machine: {machine}", f"- dtype: {header['settings']['dtype']}"])


def amount_of(results: Results, text: str) -> str:
    """How many tokens of a text were predicted, and whether that is little."""
    tokens = results.tokens.get(text)
    if tokens is None:
        return ""
    few = f" (uncertain: fewer than {FEW_TOKENS:,})" if tokens < FEW_TOKENS else ""
    return f", {tokens:,} tokens{few}"


def _ranked_table(rows: Sequence[Ranked], texts: Sequence[str]) -> str:
    head = ["#", "chosen by", "", "compensation", "kept", *texts, "KL", "top-1"]
    return _table(head, (_ranked_cells(row, texts) for row in rows))


def _ranked_cells(row: Ranked, texts: Sequence[str]) -> list[str]:
    return [
        str(row.rank),
        row.row.label,
        row.mark,
        row.row.compensation,
        "" if row.kept is None else f"{row.kept:.3f}",
        *(f"{interval(row.ratio[text])}" for text in texts),
        interval(row.kl),
        interval(row.top1),
    ]


def _answers_table(rows: Sequence[Ranked]) -> str:
    head = ["chosen by", "compensation", "set", "recall", "match", "option", "answer NLL"]
    return _table(head, (cells for row in rows for cells in _answer_cells(row)))


def _answer_cells(row: Ranked) -> Iterator[list[str]]:
    for name, figures_of in row.answers.items():
        figures = [interval(figures_of[key]) for key in ("recall", "match", "option", "answer_nll")]
        yield [row.row.label, row.row.compensation, name, *figures]


def _comparison_table(pairs: Sequence[PairedComparison]) -> str:
    head = ["keep", "units", "compensation", "first", "second", "text", "ratio", ""]
    return _table(
        head,
        (
            [
                f"{pair.ours.keep:g}",
                pair.ours.units,
                pair.ours.compensation,
                pair.ours.label,
                pair.theirs.label,
                pair.text,
                interval(pair.ratio, digits=4),
                pair.verdict,
            ]
            for pair in pairs
        ),
    )


def _table(head: Sequence[str], rows: Any) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _figure(value: float, digits: int) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.{digits}f}" if abs(value) < 100 else f"{value:.3g}"

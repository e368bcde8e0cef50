"""Results as ranked rows and paired comparisons, and both as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from spp_export.evaluation.bootstrap import Interval, array, paired_kl, paired_ratio
from spp_export.evaluation.harness.records import Record, Results
from spp_export.evaluation.harness.rows import HALF, ROUNDED, Row
from spp_export.evaluation.remarks import FEW_TOKENS
from spp_export.models.hub import DEMO_NAME

_MARKS = {
    "method": "",
    "control": "control",
    "ablation": "ablation",
    "dense": "",
    "yardstick": "yardstick",
    "dynamic": "not static",
}


@dataclass(frozen=True)
class Ranked:
    """A row among those of its budget and units; on the text that judges rank 1 has the lowest KL
    where answers were judged, else the lowest perplexity.

    greedy: tokens of the dense model's greedy answers up to the first difference, where compared
    """

    rank: int
    row: Row
    kept: float | None
    perplexity: Mapping[str, float]
    ratio: Mapping[str, Interval]
    kl: Interval
    top1: Interval
    greedy: Interval | None
    answers: Mapping[str, Mapping[str, Interval]]

    @property
    def mark(self) -> str:
        """What sets the row apart from a method, in a word."""
        return _MARKS[self.row.kind]


@dataclass(frozen=True)
class PairedComparison:
    """Two rows on a text.

    ratio  perplexity of the first over the other's: below one where the first is better
    kl     its KL to the dense model less the other's: below zero where the first is better
    by_kl  whether this judges
    """

    ours: Row
    theirs: Row
    text: str
    ratio: Interval
    kl: Interval
    by_kl: bool

    @property
    def verdict(self) -> str:
        """better or worse beyond the interval, or neither."""
        side = self.kl.side(0) if self.by_kl else self.ratio.side(1)
        return {-1: "better", 1: "worse"}.get(side, "no difference beyond the interval")


def ranking(results: Results) -> dict[tuple[float, str], list[Ranked]]:
    """Rows by (keep, units): most kept first, then in order of rank. The dense row is alone."""
    groups: dict[tuple[float, str], list[Record]] = {}
    for record in results.measured:
        groups.setdefault((record.row.keep, record.row.units), []).append(record)
    ranked = {}
    for key in sorted(groups, key=lambda key: (-key[0], key[1])):
        ordered = sorted(groups[key], key=lambda record: _order(record, results))
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
                found = paired_ratio(*scores, seed), paired_kl(*scores, seed)
                pairs.append(
                    PairedComparison(ours.row, theirs.row, text, *found, results.on_answers)
                )
    return pairs


def markdown(results: Results) -> str:
    """The whole evaluation as a page: how it was made, the ranked tables, the comparisons."""
    parts = [_header(results)]
    for (keep, units), rows in ranking(results).items():
        title = "Dense" if rows[0].row.whole else f"Keep {keep:g} of {units_name(units)}"
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


def notes(results: Results) -> list[str]:
    """Sentences that a reader needs beside the figures."""
    measured = results.measured
    sentences = []
    names = {record.row.criterion for record in measured if record.row.kind == "yardstick"}
    if HALF in names:
        sentences.append(f"dense in {HALF} is the dense model computed in bfloat16.")
    if rounded := [name for name in ROUNDED if name in names]:
        sentences.append(
            f"dense in {' and '.join(rounded)}: its projections rounded to nearest in blocks of 32 "
            "weights of a row with one scale, symmetric; embeddings and head as they are."
        )
    sentences += source_notes(results)
    if greedy := [
        record.data["greedy"]["summary"] for record in measured if "greedy" in record.data
    ]:
        sentences.append(
            "greedy: how many tokens of the dense model's greedy answer a row's greedy answer has "
            f"before the first difference; mean over {greedy[0]['prompts']} held-out prompts, "
            f"whose answers have {greedy[0]['tokens']:.1f} tokens."
        )
    return sentences


def source_notes(results: Results) -> list[str]:
    """What the model is not to be compared with, where its weights were quantised before."""
    model = results.header["model"]
    # Results from before this was looked for tell the default model by its name.
    bits = model.get("quantised_bits") or (4 if model["name"] == DEMO_NAME else None)
    if bits is None:
        return []
    return [
        f"The model's weights were quantised to {bits} bits before they came here, so the dense "
        f"model in {' and '.join(ROUNDED)} is left out: most of what rounding costs was lost "
        "before, and no comparison with it would hold for other models."
    ]


def units_name(units: str) -> str:
    """heads, channels or both, in words."""
    return {"both": "heads and channels", "all": "heads, channels and experts"}.get(units, units)


def interval(figure: Interval, digits: int = 3) -> str:
    """value [low, high]; a dash for what is not known."""
    value = _figure(figure.value, digits)
    if math.isnan(figure.low) or figure.low == figure.high:
        return value
    return f"{value} [{_figure(figure.low, digits)}, {_figure(figure.high, digits)}]"


def _order(record: Record, results: Results) -> float:
    summary = record.data["texts"][results.judge]["summary"]
    value: float | None = summary["kl" if results.on_answers else "ratio"][0]
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
        _read(record.data["greedy"]["summary"]["agreed"]) if "greedy" in record.data else None,
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
    of_judged = "answers alone" if results.on_answers else "as text without answers"
    lines = [
        f"# Evaluation of {header['model']['name']}",
        "",
        f"Scenario {header['scenario']['name']}; KL to the dense model and how often both find the "
        f"same token likeliest on {results.judge}, {of_judged}; then perplexity over the dense "
        "model's on every text. Brackets hold 95 % intervals by bootstrap over documents. Rank 1 "
        f"has the lowest {'KL' if results.on_answers else 'perplexity'} on {results.judge}.",
        "",
    ]
    lines += [
        f"- {name}: {text['documents']} documents{amount_of(results, name)}"
        for name, text in header["texts"].items()
    ]
    machine = ", ".join(f"{name} {value}" for name, value in header["machine"].items())
    dtype, matmul = (header["settings"].get(name) for name in ("dtype", "matmul"))
    low = "" if matmul in (None, "float32") else f"; statistics with products in {matmul}"
    lines += [f"- machine: {machine}", f"- dtype: {dtype}{low}"]
    return "\n".join([*lines, *(f"- {note}" for note in notes(results))])


def amount_of(results: Results, text: str) -> str:
    """How many tokens of a text were predicted, and whether that is little."""
    tokens = results.tokens.get(text)
    if tokens is None:
        return ""
    few = f" (uncertain: fewer than {FEW_TOKENS:,})" if tokens < FEW_TOKENS else ""
    return f", {tokens:,} tokens{few}"


def _ranked_table(rows: Sequence[Ranked], texts: Sequence[str]) -> str:
    greedy = any(row.greedy for row in rows)
    head = ["#", "chosen by", "", "compensation", "kept", "KL", "same token"]
    head += [*(["greedy"] if greedy else []), *(f"perplexity x, {text}" for text in texts)]
    return _table(head, (_ranked_cells(row, texts, greedy) for row in rows))


def _ranked_cells(row: Ranked, texts: Sequence[str], greedy: bool) -> list[str]:
    return [
        str(row.rank),
        row.row.label,
        row.mark,
        row.row.compensation,
        "" if row.kept is None else f"{row.kept:.3f}",
        interval(row.kl),
        interval(row.top1),
        *(["" if row.greedy is None else interval(row.greedy, 1)] if greedy else []),
        *(f"{interval(row.ratio[text])}" for text in texts),
    ]


def _answers_table(rows: Sequence[Ranked]) -> str:
    head = ["chosen by", "compensation", "set", "recall", "match", "option", "answer NLL"]
    return _table(head, (cells for row in rows for cells in _answer_cells(row)))


def _answer_cells(row: Ranked) -> Iterator[list[str]]:
    for name, figures_of in row.answers.items():
        figures = [interval(figures_of[key]) for key in ("recall", "match", "option", "answer_nll")]
        yield [row.row.label, row.row.compensation, name, *figures]


def _comparison_table(pairs: Sequence[PairedComparison]) -> str:
    head = [
        "keep",
        "units",
        "compensation",
        "first",
        "second",
        "text",
        "KL less",
        "perplexity x",
        "",
    ]
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
                interval(pair.kl, digits=4),
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

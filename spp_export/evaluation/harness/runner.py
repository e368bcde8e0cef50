"""Rows one after the other, each written as soon as it is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spp_export.common.errors import SppError
from spp_export.common.progress import progress
from spp_export.evaluation.bootstrap import (
    DocumentScores,
    agreement,
    mean_kl,
    number,
    numbers,
    perplexity,
    perplexity_ratio,
)
from spp_export.evaluation.harness.answers import DEFAULT_NEW_TOKENS
from spp_export.evaluation.harness.generation import QuestionSet, answer_row
from spp_export.evaluation.harness.greedy import GreedyReference
from spp_export.evaluation.harness.measure import DenseReference, Opened, measure_row
from spp_export.evaluation.harness.records import RecordFile
from spp_export.evaluation.harness.rows import Row, row_key


@dataclass(frozen=True)
class OpenedRow:
    """A row ready to run: what it came to, and the context that gives its model.

    generates: whether the model can be asked token by token; a row whose masks depend on the batch
    it is given cannot.
    """

    realised: Mapping[str, Any]
    opened: Opened
    generates: bool = True


OpenRow = Callable[[Row], OpenedRow]


@dataclass(frozen=True)
class Questions:
    """Evaluation sets to be answered by every row that can."""

    sets: tuple[QuestionSet, ...]
    tokenizer: Any
    max_new_tokens: int = DEFAULT_NEW_TOKENS


def run_rows(
    rows: Sequence[Row],
    open_row: OpenRow,
    reference: DenseReference,
    file: RecordFile,
    context: str,
    *,
    questions: Questions | None = None,
    greedy: GreedyReference | None = None,
    seed: int = 0,
) -> None:
    """Measure the rows that `file` does not hold yet, those that generate also beside `greedy`. A
    row that cannot be planned is recorded with the reason, and tried again by the next run."""
    missing = [(row, key) for row in rows if (key := row_key(row, context)) not in file.done]
    with progress("evaluating rows", len(missing)) as advance_to:
        for done, (row, key) in enumerate(missing):
            advance_to(done)
            start = time.perf_counter()
            try:
                opened = open_row(row)
            except SppError as error:
                file.append(key, row, {"error": str(error)})
                continue
            data = _measured(row, opened, reference, questions, greedy, seed)
            file.append(key, row, {**data, "seconds": round(time.perf_counter() - start, 1)})


def _measured(
    row: Row,
    opened: OpenedRow,
    reference: DenseReference,
    questions: Questions | None,
    greedy: GreedyReference | None,
    seed: int,
) -> dict[str, Any]:
    scores = measure_row(reference, opened.opened)
    texts = {
        text.name: {**_lists(row, text_scores), "summary": summary(text_scores, seed)}
        for text, text_scores in zip(reference.texts, scores, strict=True)
    }
    data: dict[str, Any] = {"realised": dict(opened.realised), "texts": texts}
    if greedy is not None and opened.generates:
        data["greedy"] = greedy.compare(opened.opened, seed)
    if questions is not None and opened.generates:
        data["answers"] = answer_row(
            questions.sets,
            questions.tokenizer,
            opened.opened,
            max_new_tokens=questions.max_new_tokens,
            seed=seed,
        )
    return data


def summary(scores: DocumentScores, seed: int = 0) -> dict[str, Any]:
    """Perplexity, and each figure as [value, low, high]."""
    figures = {
        "ratio": perplexity_ratio(scores, seed),
        "kl": mean_kl(scores, seed),
        "top1": agreement(scores, seed),
    }
    return {
        "tokens": number(float(scores.tokens.sum())),
        "perplexity": number(perplexity(scores)),
        **{name: numbers(interval.to_list()) for name, interval in figures.items()},
    }


def _lists(row: Row, scores: DocumentScores) -> dict[str, list[float | None]]:
    lists = scores.to_dict()
    return {"tokens": numbers(scores.tokens), **lists} if row.kind == "dense" else lists

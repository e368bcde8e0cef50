"""Rows are measured once, and a run that was cut off goes on where it was."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
from evaluating import HEADER
from factories import VOCAB, mask_in_torch
from tiny import TEXTS, make_tiny

from spp_export.common.errors import BudgetError
from spp_export.data.conversation import plain
from spp_export.data.scenario import read_scenario
from spp_export.evaluation.harness.generation import question_set
from spp_export.evaluation.harness.inputs import EvaluationText
from spp_export.evaluation.harness.measure import DenseReference, measure_row
from spp_export.evaluation.harness.records import open_records, read_results
from spp_export.evaluation.harness.rows import standard_rows
from spp_export.evaluation.harness.runner import OpenedRow, Questions, run_rows

TEXT = {"documents": 3, "sha256": "0"}
NAMES = ("one", "two")
ROWS = standard_rows([0.8], ["energy", "flap"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("runner"))


@pytest.fixture
def run(tiny, tmp_path):
    """Runs rows into one file; keeps which were opened. `stop` raises in place of that row."""
    parts = [tuple(map(plain, part)) for part in (TEXTS[:4], TEXTS[4:])]
    texts = [EvaluationText(name, part) for name, part in zip(NAMES, parts, strict=True)]
    reference = DenseReference(tiny.model, tiny.tokenizer, texts, VOCAB)
    opened = []

    def open_row(row, stop=None, error=KeyboardInterrupt):
        opened.append(row)
        if row == stop:
            raise error
        if row.kind == "dense":
            return OpenedRow({"keep": 1.0}, lambda: nullcontext(tiny.model))
        masked = lambda: mask_in_torch(tiny.model, tiny.layers)  # noqa: E731
        return OpenedRow({"keep": 0.8}, masked, generates=row.criterion != "flap")

    def go(rows=ROWS, context="c", questions=None, **stop):
        path = tmp_path / "results.jsonl"
        with open_records(path, {**HEADER, "texts": dict.fromkeys(NAMES, TEXT)}) as file:
            run_rows(
                rows,
                lambda row: open_row(row, **stop),
                reference,
                file,
                context,
                questions=questions,
            )
        return read_results(path)

    go.opened = opened
    go.reference = reference
    go.path = tmp_path / "results.jsonl"
    return go


def test_scores_in_the_file_are_those_measured(run, tiny):
    found = run()
    assert [record.row for record in found.records] == list(ROWS)
    measured = measure_row(run.reference, lambda: mask_in_torch(tiny.model, tiny.layers))
    for name, expected in zip(NAMES, measured, strict=True):
        scores = found.scores(found.records[1], name)
        for part in ("tokens", "dense_nll", "nll", "kl", "agreed"):
            assert getattr(scores, part) == pytest.approx(getattr(expected, part), rel=1e-7)
    summary = found.records[0].data["texts"]["one"]["summary"]
    assert summary["ratio"] == [1, 1, 1]
    assert summary["kl"] == [0, 0, 0]


def test_a_finished_run_measures_nothing_again(run):
    run()
    before = run.path.read_bytes()
    run.opened.clear()
    run()
    assert run.opened == []
    assert run.path.read_bytes() == before


@pytest.mark.parametrize("torn", [False, True])
def test_an_interrupted_run_goes_on(run, torn):
    with pytest.raises(KeyboardInterrupt):
        run(stop=ROWS[3])
    if torn:
        run.path.write_bytes(run.path.read_bytes()[:-9])
    run.opened.clear()
    found = run()
    assert run.opened == list(ROWS[2 if torn else 3 :])
    assert [record.row for record in found.records] == list(ROWS)
    assert all(json.loads(line) for line in run.path.read_text().splitlines())


def test_a_row_that_cannot_be_planned_does_not_stop_the_rest(run):
    found = run(stop=ROWS[2], error=BudgetError("no plan meets it."))
    assert [(record.row, record.error) for record in found.failed] == [
        (ROWS[2], "no plan meets it.")
    ]
    assert len(found.measured) == len(ROWS) - 1
    run.opened.clear()
    assert run().failed == ()
    assert run.opened == [ROWS[2]]


def test_more_rows_join_those_measured(run):
    run(rows=ROWS[:3])
    run.opened.clear()
    assert len(run().records) == len(ROWS)
    assert run.opened == list(ROWS[3:])


def test_only_rows_that_can_answer_do(run, tiny, tmp_path):
    quiz = tmp_path / "quiz.jsonl"
    quiz.write_text('{"prompt": "Salt?", "answer": "yes it is"}\n{"prompt": "A?", "answer": "B"}\n')
    sets = (question_set(tiny.tokenizer, read_scenario(quiz)),)
    found = run(rows=ROWS[:3], questions=Questions(sets, tiny.tokenizer, max_new_tokens=4))
    answered = ["answers" in record.data for record in found.records]
    assert [(record.row.label) for record in found.records] == ["dense", "energy", "flap"]
    assert answered == [True, True, False]
    assert found.records[0].data["answers"]["quiz.jsonl"]["turns"] == [1, 1]

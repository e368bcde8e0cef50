"""Ranks, comparisons, the page and the curves, from results made by hand."""

from __future__ import annotations

import json
import math

import pytest
from evaluating import HEADER, TEXTS, method, record, write_results

from spp_export.evaluation.bootstrap import Interval
from spp_export.evaluation.harness.curves import curves, drawn_figure, write_curves
from spp_export.evaluation.harness.records import open_records, read_results
from spp_export.evaluation.harness.rows import DENSE, Row, standard_rows
from spp_export.evaluation.harness.table import (
    comparisons,
    interval,
    markdown,
    notes,
    ranking,
)
from spp_export.models.hub import DEMO_NAME

MAIN = method(criterion="obs")
MEAN = method(criterion="obs", text="mean", kind="control")
WRONG = method(criterion="obs", text="wrong", kind="control")
RANDOM = Row(0.8, "heads", "random", whitelist=False, kind="control", seed=2)
PLAIN = method(compensation="none")
DYNAMIC = Row(0.8, "heads", "probe-pruning", compensation="none", whitelist=False, kind="dynamic")
OTHER_BUDGET = method(keep=0.9, criterion="obs")
ROWS = [
    (RANDOM, 1.5),
    (MAIN, 0.02),
    (WRONG, 0.05),
    (MEAN, 0.02),
    (PLAIN, 0.3),
    (DYNAMIC, 0.2),
    (OTHER_BUDGET, 0.01),
]


@pytest.fixture
def results(tmp_path):
    return read_results(write_results(tmp_path / "results.jsonl", ROWS))


def test_rows_are_ranked_within_their_budget(results):
    found = ranking(results)
    assert list(found) == [(1.0, "both"), (0.9, "heads"), (0.8, "heads")]
    assert [(r.rank, r.row.label) for r in found[0.8, "heads"]] == [
        (1, "obs"),
        (2, "obs, domain mean"),
        (3, "obs, wrong scenario"),
        (4, "probe-pruning"),
        (5, "energy"),
        (6, "random, seed 2"),
    ]
    first = found[0.8, "heads"][0]
    assert first.ratio["scenario, held out"].value == pytest.approx(math.exp(0.02), rel=0.01)
    assert first.kept == 0.8
    assert [r.mark for r in found[0.8, "heads"]][2:4] == ["control", "not static"]


def test_where_answers_were_judged_kl_ranks_and_judges(tmp_path):
    """Perplexity may fall below the dense model's: then it says little."""
    path = write_results(tmp_path / "results.jsonl", [(MAIN, 0.05), (MEAN, -0.08)])
    assert [r.row for r in ranking(read_results(path))[0.8, "heads"]] == [MEAN, MAIN]
    text = path.read_text().replace(
        '"abc", "dtype": "float32"}', '"abc", "number of answer tokens": 96}'
    )
    path.write_text(text)
    found = read_results(path)
    assert [r.row for r in ranking(found)[0.8, "heads"]] == [MAIN, MEAN]
    assert {pair.verdict for pair in comparisons(found)} == {"better"}
    drawn = {curve.label: curve.points[0][1] for curve in curves(found)["heads", "lstsq"]}
    assert drawn["obs"].value == pytest.approx(0.05, rel=0.1)
    assert drawn_figure(found) == "KL to dense, nats"
    assert write_curves(found, tmp_path / "kl.png")
    page = markdown(found)
    assert "Rank 1 has the lowest KL on" in page
    assert "answers alone" in page


def test_yardsticks_stand_beside_the_dense_row(tmp_path):
    sticks = standard_rows([], [], yardsticks=["bf16", "int8", "int4"])[1:]
    losses = zip(sticks, (-0.001, 0.002, 0.1), strict=True)
    found = read_results(write_results(tmp_path / "results.jsonl", [(MAIN, 0.1), *losses]))
    page = markdown(found)
    assert page.index("## Dense") < page.index("| yardstick |") < page.index("## Keep 0.8")
    assert "- dense in int8 and int4: its projections rounded to nearest in blocks of 32" in page
    assert "- dense in bf16 is the dense model computed in bfloat16." in page
    assert "left out" not in page
    assert {curve.kind for panel in curves(found).values() for curve in panel} == {"method"}


@pytest.mark.parametrize("name", ["a-model", DEMO_NAME])
def test_of_a_model_that_was_quantised_every_page_says_so(tmp_path, name):
    path = write_results(tmp_path / "results.jsonl", [(MAIN, 0.1)])
    bits = ', "quantised_bits": 4' if name == "a-model" else ""
    path.write_text(path.read_text().replace('"a-model"', f'"{name}"{bits}', 1))
    found = read_results(path)
    assert "quantised to 4 bits before they came here" in markdown(found)
    assert "int8 and int4 is left out" in notes(found)[0]


def test_greedy_agreement_has_a_column(tmp_path):
    summary = {"prompts": 9, "tokens": 88.4, "agreed": [31.25, 20.0, 44.0]}
    path = write_results(tmp_path / "results.jsonl", [(RANDOM, 1.0)])
    line = record(MAIN, 0.1, greedy={"agreed": [31.25], "tokens": [88.4], "summary": summary})
    path.write_text(path.read_text() + json.dumps(line) + "\n")
    page = markdown(read_results(path))
    assert "| same token | greedy | perplexity x" in page
    assert "| 31.2 [20.0, 44.0] |" in page
    assert "mean over 9 held-out prompts, whose answers have 88.4 tokens" in page


def test_what_has_no_ratio_comes_last(tmp_path):
    rows = [(MAIN, 1e6), (RANDOM, 1.5)]
    found = read_results(write_results(tmp_path / "results.jsonl", rows))
    assert [r.row for r in ranking(found)[0.8, "heads"]] == [RANDOM, MAIN]


def test_the_first_criterion_is_compared_with_the_rest_of_its_budget(results):
    found = {each.theirs: each for each in comparisons(results)}
    assert set(found) == {MEAN, WRONG, RANDOM, DYNAMIC}
    assert {each.ours for each in found.values()} == {MAIN}
    assert found[WRONG].verdict == "better"
    assert found[WRONG].ratio.value == pytest.approx(math.exp(-0.03), rel=0.001)
    assert found[MEAN].verdict == "no difference beyond the interval"


def test_the_page(results):
    page = markdown(results)
    assert page.startswith("# Evaluation of a-model\n")
    assert "## Keep 0.8 of heads" in page
    assert "| 1 | obs |  | lstsq | 0.800 | 0.0" in page
    assert "| KL | same token | perplexity x, scenario, held out | perplexity x, chem" in page
    assert "| 6 | random, seed 2 | control |" in page
    assert "| 0.8 | heads | lstsq | obs | obs, wrong scenario | chemistry pool | -0.0" in page
    for line in page.splitlines():
        assert not line.startswith("|") or line.endswith("|")
    assert page == markdown(results)


def test_the_page_names_rows_that_failed(tmp_path):
    path = write_results(tmp_path / "results.jsonl", ROWS)
    with open_records(path, HEADER) as file:
        file.append("k", method(criterion="axis"), {"error": "the artifacts hold no axis."})
    assert "- axis, keep 0.8: the artifacts hold no axis." in markdown(read_results(path))


def test_the_page_shows_answers(tmp_path):
    figures = {"recall": [0.5, 0.4, 0.6], "match": [0.25, 0.1, 0.4], "option": [None, None, None]}
    answers = {"quiz.json": {"summary": {**figures, "answer_nll": [2.5, 2.4, 2.6]}}}
    path = write_results(tmp_path / "results.jsonl", [])
    found = record(MAIN, 0.1, answers=answers)
    with open_records(path, HEADER) as file:
        file.append(found.pop("key"), MAIN, {k: v for k, v in found.items() if k != "row"})
    page = markdown(read_results(path))
    assert "| obs | lstsq | quiz.json | 0.500 [0.400, 0.600] | 0.250 [0.100, 0.400] | - |" in page


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (Interval(1.02345, 1.01, 1.04), "1.023 [1.010, 1.040]"),
        (Interval(1.0, 1.0, 1.0), "1.000"),
        (Interval(1.5, math.nan, math.nan), "1.500"),
        (Interval(math.nan, math.nan, math.nan), "-"),
        (Interval(12345.6, 1000.0, 2e9), "1.23e+04 [1e+03, 2e+09]"),
    ],
)
def test_intervals_as_text(found, text):
    assert interval(found) == text


def test_curves_by_units_and_compensation(results):
    """What was measured at one budget only has no curve where others have one."""
    found = curves(results)
    assert list(found) == [("heads", "lstsq")]
    panel = {curve.label: curve for curve in found["heads", "lstsq"]}
    assert next(iter(panel)) == "obs"
    assert [round(share, 2) for share, _ in panel["obs"].points] == [0.1, 0.2]
    assert {"energy", "probe-pruning"}.isdisjoint(panel)


def test_points_of_one_budget_are_drawn_where_there_are_no_curves(tmp_path):
    dynamic = Row(0.8, "heads", "probe-pruning", compensation="none", kind="dynamic")
    plain = Row(0.8, "heads", "energy", compensation="none")
    path = write_results(tmp_path / "results.jsonl", [(MAIN, 0.1), (dynamic, 0.2), (plain, 0.3)])
    found = {key: {c.label for c in panel} for key, panel in curves(read_results(path)).items()}
    assert found == {
        ("heads", "lstsq"): {"obs", "probe-pruning"},
        ("heads", "none"): {"energy", "probe-pruning"},
    }


def test_curves_are_drawn_and_the_same_every_time(results, tmp_path):
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    assert write_curves(results, first)
    assert write_curves(results, second)
    assert first.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert first.read_bytes() == second.read_bytes()


def test_nothing_to_draw(tmp_path):
    found = read_results(write_results(tmp_path / "results.jsonl", []))
    assert found.records[0].row == DENSE
    assert not write_curves(found, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_a_page_says_how_much_text_there_was(results):
    assert set(results.tokens) == set(TEXTS)
    page = markdown(results)
    for name, count in results.tokens.items():
        few = " (uncertain: fewer than 2,000)" if count < 2000 else ""
        assert f"- {name}: 40 documents, {count:,} tokens{few}\n" in page

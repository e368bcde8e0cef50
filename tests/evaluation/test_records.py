"""The results file: whole lines only, one evaluation only, one writer only."""

from __future__ import annotations

import json

import pytest
from evaluating import HEADER, method, record, write_results

from spp_export.common.errors import OutputError
from spp_export.evaluation.harness.records import open_records, read_results
from spp_export.evaluation.harness.rows import DENSE


def data(row, loss=0.1):
    found = record(row, loss)
    return found["key"], {name: found[name] for name in ("realised", "texts")}


def append(file, row, loss=0.1):
    key, values = data(row, loss)
    file.append(key, row, values)


def test_what_was_appended_is_read_back(tmp_path):
    path = tmp_path / "results.jsonl"
    with open_records(path, HEADER) as file:
        append(file, DENSE, 0.0)
        append(file, method())
    found = read_results(path)
    assert found.header == HEADER
    assert [r.row for r in found.records] == [DENSE, method()]
    scores = found.scores(found.records[1], "chemistry pool")
    assert scores.tokens.shape == (40,)
    assert (scores.nll > scores.dense_nll).all()


@pytest.mark.parametrize("cut", [1, 7, 400])
def test_a_torn_last_line_is_dropped_and_written_again(tmp_path, cut):
    path = tmp_path / "results.jsonl"
    with open_records(path, HEADER) as file:
        append(file, DENSE, 0.0)
        append(file, method())
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert [r.row for r in read_results(path).records] == [DENSE]
    with open_records(path, HEADER) as file:
        assert file.done == {data(DENSE)[0]}
        append(file, method())
    assert path.read_bytes() == whole


def test_a_torn_header_begins_the_file_again(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"schema_ver')
    with open_records(path, HEADER) as file:
        assert file.done == set()
    assert read_results(path).header == HEADER


def test_a_failed_row_is_no_result(tmp_path):
    path = tmp_path / "results.jsonl"
    with open_records(path, HEADER) as file:
        file.append(data(method())[0], method(), {"error": "no plan meets it."})
        assert file.done == set()
    found = read_results(path)
    assert [r.error for r in found.failed] == ["no plan meets it."]
    with open_records(path, HEADER) as file:
        append(file, method())
    assert read_results(path).failed == ()
    assert len(read_results(path).records) == 1


def test_another_evaluation_is_not_continued(tmp_path):
    path = write_results(tmp_path / "results.jsonl", [])
    before = path.read_bytes()
    other = {**HEADER, "context": {"model": "abc", "dtype": "bfloat16", "scenario": "x"}}
    with (
        pytest.raises(OutputError, match="a different dtype and scenario"),
        open_records(path, other),
    ):
        pass
    assert path.read_bytes() == before


def test_two_writers_are_refused(tmp_path):
    path = tmp_path / "results.jsonl"
    with (
        open_records(path, HEADER),
        pytest.raises(OutputError, match="another evaluation"),
        open_records(path, HEADER),
    ):
        pass


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "header"),
        ("[]\n", "header"),
        ("{}\n", "header"),
        ("nonsense\n", "line 1"),
        (json.dumps({"context": {}, "schema_version": 9}) + "\n", "schema_version is 9"),
        (json.dumps(HEADER) + '\n{"key": 1}\n', "line 2"),
        (json.dumps(HEADER) + "\n[]\n", "line 2"),
        (json.dumps(HEADER) + '\n{"key": "1", "row": {"odd": 1}}\n', "line 2"),
    ],
)
def test_what_is_no_results_file_is_refused(tmp_path, text, message):
    path = tmp_path / "results.jsonl"
    path.write_text(text)
    with pytest.raises(OutputError, match=message):
        read_results(path)


def test_scores_need_the_dense_row(tmp_path):
    path = tmp_path / "results.jsonl"
    with open_records(path, HEADER) as file:
        append(file, method())
    found = read_results(path)
    with pytest.raises(OutputError, match="no dense row"):
        found.scores(found.records[0], "chemistry pool")


def test_numbers_without_a_word_in_json_survive(tmp_path):
    path = tmp_path / "results.jsonl"
    with open_records(path, HEADER) as file:
        append(file, DENSE, 0.0)
        append(file, method(), 1e6)  # a perplexity beyond what a float holds
    found = read_results(path).records[1]
    assert found.data["texts"]["chemistry pool"]["summary"]["perplexity"] is None

"""Memory as measured against what the plan predicts, for engines and kinds of attention."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from benching import make_graph, make_pair

from spp_bench.candidates import in_genai, onnx_candidate, read_out, torch_candidate, windows_of
from spp_bench.cases import Cell
from spp_bench.memory import hold, measure_memory, with_prediction
from spp_bench.onnx_weights import stored_weights
from spp_export.common.errors import ModelError
from spp_export.formats.onnx.options import OnnxOptions
from spp_export.models.checkpoint.checkpoint import open_source

CELLS = (Cell(1, 6), Cell(2, 11))


def found(candidate, new_tokens=3):
    return with_prediction(candidate, hold(candidate, CELLS, new_tokens, "cpu", 1), new_tokens)


@pytest.mark.parametrize(
    "case", ["llama-gqa-bias", "mistral-window-tied", "qwen2-mha-window", "qwen3-gqa-tied"]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_holds_what_is_predicted(tmp_path, case, dtype):
    dense, slim = make_pair(tmp_path, case)
    source = open_source(dense)
    for out in (None, read_out(slim, source)):
        candidate = torch_candidate(source, out, dtype, windows_of(source))
        record = found(candidate)
        assert record["problems"] == []
        assert record["weight_bytes"] == record["predicted_weight_bytes"]
        for cell in record["cells"]:
            assert cell["kv_bytes"] == cell["predicted_kv_bytes"]


def test_graphs_hold_what_is_predicted(tmp_path):
    pytest.importorskip("onnxruntime")
    dense, slim = make_pair(tmp_path, "qwen2-gqa-tied")
    source, graph = open_source(dense), make_graph(tmp_path, dense, slim)
    out = read_out(graph, source)
    candidate = onnx_candidate(source, out, OnnxOptions(), graph, windows_of(source))
    record = found(candidate)
    assert record["problems"] == []
    # Tied: the one table is the head too, and is read whole; a few constants are gathered.
    weights = stored_weights(graph)
    assert 0 <= weights.total - weights.read < 100
    pytest.importorskip("onnxruntime_genai")
    row = in_genai(candidate)
    assert (row.name, row.engine) == ("graph genai", "genai")
    record = found(row)
    for cell in record["cells"]:
        assert cell["kv_bytes"] == cell["predicted_kv_bytes"]


def test_an_embedding_that_is_only_gathered_is_not_read(tmp_path):
    pytest.importorskip("onnxruntime")
    dense, slim = make_pair(tmp_path, "llama-mqa")
    weights = stored_weights(make_graph(tmp_path, dense, slim))
    shape = open_source(dense).shape
    table = 4 * shape.vocab_size * shape.hidden_size
    assert 0 <= weights.total - weights.read - table < 100


def test_what_differs_by_more_than_two_percent_is_named(tmp_path):
    dense, _ = make_pair(tmp_path)
    source = open_source(dense)
    candidate = torch_candidate(source, None, "float32", windows_of(source))
    assert candidate.predicted_bytes
    wrong = replace(candidate, predicted_bytes=round(candidate.predicted_bytes / 1.03))
    (problem,) = found(wrong)["problems"]
    assert problem.startswith("weights:")


def test_a_fresh_process_measures(tmp_path):
    pytest.importorskip("onnxruntime")
    dense, slim = make_pair(tmp_path)
    source, graph = open_source(dense), make_graph(tmp_path, dense, slim)
    out = read_out(graph, source)
    candidate = onnx_candidate(source, out, OnnxOptions(), graph, windows_of(source))
    record = measure_memory(candidate, CELLS, 3, "cpu", 1)
    assert record["problems"] == []
    assert 0 < record["before_bytes"] <= record["cells"][0]["peak_bytes"]
    lost = replace(candidate, directory=Path(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="measuring its memory failed"):
        measure_memory(lost, CELLS, 3, "cpu", 1)

"""The comparison of exporters: what it measures, what it refuses, and that failures are rows."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import CASES, make_checkpoint, random_layers, shape_of, write_slim

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from spp_campaigns.onnx_exporters import __main__ as command  # noqa: E402
from spp_campaigns.onnx_exporters import candidates  # noqa: E402
from spp_campaigns.onnx_exporters import compare as comparison  # noqa: E402
from spp_campaigns.onnx_exporters.candidates import CANDIDATES, Candidate  # noqa: E402
from spp_campaigns.onnx_exporters.compare import REFERENCE, SHARED, Workload  # noqa: E402
from spp_campaigns.onnx_exporters.runners import GrowingRunner, open_sessions  # noqa: E402
from spp_export import load_slim  # noqa: E402
from spp_export.formats.onnx import OnnxOptions  # noqa: E402
from spp_export.formats.onnx.write import write_onnx  # noqa: E402

TINY = Workload(prompt=5, new=3, rounds=1, threads=1)


@pytest.fixture(scope="module")
def slim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Per-layer, with other KV heads in each layer."""
    root = tmp_path_factory.mktemp("slim")
    dense = make_checkpoint(root, "llama", kv_heads=3, query_heads=9, hidden=72)
    layers = random_layers(shape_of(dense), 2)
    assert len({len(layer.kv_heads) for layer in layers}) > 1
    return write_slim(root / "slim", dense, layers)


@pytest.fixture(scope="module")
def graphs(slim: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    root = tmp_path_factory.mktemp("graphs")
    for attention in ("gqa", "standard"):
        (root / attention).mkdir()
        write_onnx(slim, root / attention, OnnxOptions(attention=attention))
    return {name: [root / name / "model.onnx"] for name in ("gqa", "standard")}


def vocab(slim: Path) -> int:
    return json.loads((slim / "config.json").read_text())["vocab_size"]


def test_cached_decoding_is_the_whole_sequence_at_once(slim, graphs):
    fed = TINY.tokens(vocab(slim))
    tokens = np.concatenate([fed.prompt, fed.continuation], axis=1)
    with torch.no_grad():
        expected = load_slim(slim)(input_ids=torch.from_numpy(tokens)).logits.numpy()
    runner = GrowingRunner("gqa", open_sessions(graphs["gqa"], 1))
    prompt, steps = comparison._logits(runner, fed)
    np.testing.assert_allclose(np.concatenate([prompt, steps], 1), expected, atol=1e-4)


def test_only_a_graph_that_takes_one_buffer_gets_a_shared_row(slim, graphs):
    rows = comparison.compare(slim, vocab(slim), graphs, TINY)
    assert set(rows) == {REFERENCE, "gqa", "gqa" + SHARED, "standard"}
    assert rows["gqa"]["shared_kv"] == "yes"
    assert rows["standard"]["shared_kv"].startswith("no: ")
    for name, row in rows.items():
        assert row["prefill_p20_ms"] <= row["prefill_median_ms"] <= row["prefill_p80_ms"]
        assert row["decode_median_ms"] > 0
        if name != REFERENCE:
            assert 0 < row["prefill_diff"] < 1e-4
            assert row["same_argmax"] == 1


def test_a_graph_of_other_weights_is_not_timed(slim, graphs, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    dense = make_checkpoint(tmp_path, "llama", kv_heads=3, query_heads=9, hidden=72, seed=1)
    write_onnx(dense, other, OnnxOptions())
    rows = comparison.compare(slim, vocab(slim), {"wrong": [other / "model.onnx"]}, TINY)
    assert "logits differ by" in rows["wrong"]["error"]
    assert set(rows["wrong"]) == {"error"}


def test_a_graph_that_does_not_load_is_a_row_with_one_line(slim, tmp_path):
    broken = tmp_path / "model.onnx"
    broken.write_bytes(b"no graph")
    rows = comparison.compare(slim, vocab(slim), {"broken": [broken]}, TINY)
    assert "InvalidProtobuf" in rows["broken"]["error"]
    assert "\n" not in rows["broken"]["error"]


def test_facts_of_a_graph(graphs):
    paths = graphs["gqa"]
    facts = candidates.graph_facts(paths[0].parent, ("model.onnx",))
    model = onnx.load(paths[0])
    kinds = [node.op_type for node in model.graph.node]
    assert facts["nodes"] == len(kinds)
    assert facts["microsoft_ops"] >= kinds.count("GroupQueryAttention") == 3
    assert facts["batch"] == "any"
    files = ("model.onnx", "model.onnx_data")
    size = sum((paths[0].parent / name).stat().st_size for name in files)
    assert facts["file_mb"] == pytest.approx(size / 1e6, abs=0.05)
    twice = candidates.graph_facts(paths[0].parent, ("model.onnx", "model.onnx"))
    assert twice["nodes"] == 2 * facts["nodes"]


def test_a_failing_export_is_one_line(tmp_path):
    candidate = Candidate("unknown to the child", "", lambda: lambda slim, out: None)
    found = candidates.run_export(candidate, tmp_path, tmp_path / "out", 60)
    assert found == {"error": "KeyError: 'unknown to the child'"}


@pytest.mark.slow
def test_the_command_writes_rows_and_removes_its_graphs(slim, tmp_path, monkeypatch, capsys):
    failing = Candidate("failing", "fails", lambda: None)
    monkeypatch.setitem(CANDIDATES, failing.name, failing)  # which the child does not know
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    out = tmp_path / "result.json"
    arguments = [str(slim), "--json", str(out), "--only", "spp gqa", "--only", failing.name]
    command.main([*arguments, "--prompt", "5", "--new", "3", "--rounds", "1", "--threads", "1"])
    document = json.loads(out.read_text())
    assert document["workload"] == {"prompt": 5, "new": 3, "rounds": 1, "threads": 1}
    assert {"cpu", "cores", "torch", "transformers", "onnxruntime"} <= set(document["machine"])
    rows = {row["name"]: row for row in document["rows"]}
    assert set(rows) == {REFERENCE, "spp gqa", "spp gqa" + SHARED, "failing"}
    assert rows["failing"]["error"] == "KeyError: 'failing'"
    assert rows["spp gqa"]["seconds"] > 0
    assert rows["spp gqa"]["peak_mb"] > 0
    assert not list(scratch.iterdir())
    printed = capsys.readouterr().out
    assert "failing: KeyError" in printed
    assert document["machine"]["cpu"] in printed.replace("\n", " ")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[:1], ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["torch 23", "transformers fused 1", "transformers stages"])
def test_exporters_of_others_say_what_the_slim_model_says(case, name, tmp_path):
    pytest.importorskip("onnxscript")
    dense = case.make(tmp_path)
    slim = write_slim(tmp_path / "slim", dense, random_layers(shape_of(dense), 5))
    candidate, out = CANDIDATES[name], tmp_path / "out"
    facts = candidates.run_export(candidate, slim, out, 300)
    assert "error" not in facts
    paths = [out / graph for graph in candidate.graphs]
    rows = comparison.compare(slim, vocab(slim), {name: paths}, TINY)
    assert rows[name]["decode_diff"] < 1e-4

"""The scale benchmark at a size that takes no time: what it builds, measures and judges."""

from __future__ import annotations

import json

import pytest

from spp_campaigns import big_checkpoints, scale
from spp_export.models.checkpoint.checkpoint import open_source

TINY = {"hidden_size": 64, "head_dim": 2, "intermediate_size": 96, "vocab_size": 50}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(big_checkpoints, "CONFIG", {**big_checkpoints.CONFIG, **TINY})
    monkeypatch.setattr(big_checkpoints, "SHARD_BYTES", 100_000)


def test_what_is_built_is_a_sharded_model_of_the_size(tiny, tmp_path):
    big_checkpoints.build(tmp_path, 0.001)
    source = open_source(tmp_path)
    size = sum(tensor.nbytes for tensor in source.tensors.values())
    assert size == pytest.approx(1e6, rel=0.05)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 5
    assert {tensor.dtype for tensor in source.tensors.values()} == {"BF16"}
    plan, shape = big_checkpoints.plan_for(source), source.shape
    kept = shape.head_parameters(plan.layer_shapes(shape)) / shape.head_parameters(shape.layers)
    assert kept == pytest.approx(0.8, abs=0.02)
    assert len({(len(one.kv_heads), len(one.query_heads)) for one in plan.layers}) == 3


def test_a_child_tells_what_a_slice_took(tiny, tmp_path):
    model, target = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    big_checkpoints.build(model, 0.001)
    found = scale._fresh("slice", model, target)
    assert (target / "manifest.json").exists()
    assert 0 < found["out_bytes"] < found["source_bytes"] + 50_000
    assert found["seconds"] > 0
    assert found["peak_bytes"] >= found["imports_bytes"] > 0
    assert found["largest_tensor_bytes"] == 2 * 64 * 96
    assert 0.7 < found["head_parameters_kept"] < 0.9


FOUND = {
    "job": "slice",
    "cold_cache": True,
    "times_cp": 1.2,
    "peak_bytes": 100,
    "limit_bytes": 100,
    "imports_bytes": 5,
    "largest_tensor_bytes": 7,
    "resident_parameters": 11,
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"times_cp": 1.51}, ["time"]),
        ({"times_cp": 1.51, "cold_cache": False}, []),
        ({"times_cp": 9.0, "job": "onnx"}, []),
        ({"peak_bytes": 101}, ["memory"]),
        ({"peak_bytes": 101, "times_cp": 3.0}, ["memory", "time"]),
    ],
)
def test_what_is_judged(changes, expected):
    assert scale.problems({**FOUND, **changes}) == expected


def test_limits():
    assert scale.limit("slice", FOUND) == 300_000_014
    assert scale.limit("onnx", FOUND) == 300_000_019
    assert scale.limit("verify", FOUND) == 300_000_005 + 8 * 11


def test_runs_alternate_with_copies_and_the_best_counts(monkeypatch, tmp_path):
    said, seconds = [], iter([3.0, 2.0])

    def copy(model, target):
        said.append("cp")
        target.mkdir()
        return 0.5, 1.0 if len(said) == 1 else 2.0

    def child(job, model, target):
        said.append(job)
        target.mkdir()
        return {**FOUND, "seconds": next(seconds), "peak_anonymous_bytes": len(said)}

    monkeypatch.setattr(scale, "copy", copy)
    monkeypatch.setattr(scale, "prepare", lambda model, cold: said.append(cold) or said.pop())
    monkeypatch.setattr(scale, "_fresh", child)
    found = scale.measure("slice", tmp_path, tmp_path / "out", 2, True)
    assert said == ["cp", "slice", "cp", "slice"]
    assert (found["seconds"], found["cp_and_flush_seconds"], found["times_cp"]) == (2.0, 1.0, 2.0)
    assert found["peak_anonymous_bytes"] == 4
    assert found["problems"] == ["time"]


def test_a_missed_figure_is_the_exit_status(monkeypatch, tmp_path, capsys):
    row = {
        **FOUND,
        "source_bytes": 1e9,
        "out_bytes": 1e9,
        "seconds": 2.0,
        "cp_and_flush_seconds": 1.0,
        "peak_anonymous_bytes": 1,
    }
    monkeypatch.setattr(scale, "build", lambda directory, gigabytes: None)
    monkeypatch.setattr(scale, "measure", lambda job, *_: {**row, "job": job, "problems": []})
    asked = ["--gigabytes", "0.002", "0.001", "--dir", str(tmp_path), "--json"]
    file = tmp_path / "scale.json"
    assert scale.main([*asked, str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [one["job"] for one in rows] == ["slice", "onnx", "slice"]
    assert "2.00 s, cp and flush 1.00 s, 1.20 times" in capsys.readouterr().out
    monkeypatch.setattr(scale, "measure", lambda job, *_: {**row, "problems": ["time"]})
    assert scale.main([*asked, str(file), "--no-onnx", "--verify"]) == 1
    assert "MISSED: time" in capsys.readouterr().out

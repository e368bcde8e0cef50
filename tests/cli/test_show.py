"""`show` on one of each kind, written by hand or by other libraries."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from family_models import make_dense
from safetensors.numpy import save_file
from vision_models import make_seeing

from spp_export import show
from spp_export.common.errors import ArtifactsError, UsageError
from spp_export.common.manifest import write_manifest
from spp_export.data.artifacts import Artifacts, write_artifacts
from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.models.families import FAMILIES
from spp_export.models.hub import DEMO_NAME
from spp_export.models.shape import LAYOUTS

PLAN = {
    "schema_version": 1,
    "model": {"fingerprint": "f" * 64, "source": "org/model"},
    "layout": "per-layer",
    "compensation": "none",
    "layers": [
        {"kv_heads": [0, 2], "query_heads": [0, 2, 6, 7], "channels": None},
        {"kv_heads": [1], "query_heads": [3], "channels": [0, 5]},
    ],
    "scenario": {"name": "s.txt", "sha256": "a" * 64},
    "budget": {"asked": {"keep": 0.6}, "realised": {"keep": 0.59}},
    "diagnosis": {"mixture": {"math": 1.0}, "breadth": 0.0, "regime": "in-domain"},
}


@pytest.fixture
def export(tmp_path):
    directory = tmp_path / "out"
    directory.mkdir()
    (directory / "plan.json").write_text(json.dumps(PLAN))
    (directory / "weights.bin").write_bytes(b"x" * 1000)
    report = {"schema_version": 1, "passed": True, "checks": [], "quality": {"ratio": 1.02}}
    (directory / "verify.json").write_text(json.dumps(report))
    write_manifest(directory)
    return directory


def test_a_plan(tmp_path):
    path = tmp_path / "any.json"
    path.write_text(json.dumps(PLAN))
    found = show(path)
    assert (found.kind, found.problems) == ("plan", None)
    assert found.facts == {
        "model": "org/model",
        "fingerprint": "f" * 64,
        "layout": "per-layer",
        "compensation": "none",
        "layers": 2,
        "query_heads": [4, 1],
        "kv_heads": [2, 1],
        "channels": [None, 2],
        "scenario": "s.txt",
        "scenario_sha256": "a" * 64,
        "mixture": {"math": 1.0},
        "breadth": 0.0,
        "regime": "in-domain",
        "asked": {"keep": 0.6},
        "realised_keep": 0.59,
    }


def test_a_whole_export(export):
    found = show(export)
    size = sum(file.stat().st_size for file in export.iterdir())
    assert (found.kind, found.problems) == ("slim checkpoint", ())
    expected = {"model": "org/model", "bytes": size, "verified": "passed", "perplexity_ratio": 1.02}
    assert expected.items() <= found.facts.items()
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


def test_a_changed_export(export):
    (export / "weights.bin").write_bytes(b"y" * 1000)
    (export / "verify.json").unlink()
    found = show(export)
    hashes = [hashlib.sha256(byte * 1000).hexdigest() for byte in (b"y", b"x")]
    assert found.problems == (
        "verify.json: missing",
        f"weights.bin: its content has changed, SHA-256 {hashes[0]}, the manifest says {hashes[1]}",
    )
    assert found.facts["verified"] == "no"


@pytest.fixture
def graph(export):
    form = {"attention": "gqa-bias", "precision": "fp16", "quant": None, "layout": "per-layer"}
    (export / "config.json").write_text(json.dumps({"spp_onnx": form}))
    (export / "model.onnx").write_bytes(b"g" * 20)
    (export / "model.onnx_data").write_bytes(b"d" * 300)
    write_manifest(export)
    return export


def test_an_onnx_export(graph):
    found = show(graph)
    size = sum(file.stat().st_size for file in graph.iterdir())
    assert (found.kind, found.problems) == ("ONNX export", ())
    assert list(found.facts)[:5] == ["attention", "precision", "quant", "graph_bytes", "model"]
    expected = {
        "attention": "gqa-bias",
        "precision": "fp16",
        "quant": "none",
        "layers": 2,
        "graph_bytes": 320,
        "bytes": size,
        "verified": "passed",
    }
    assert expected.items() <= found.facts.items()
    assert (found.facts["query_heads"], found.facts["kv_heads"]) == ([4, 1], [2, 1])
    assert "quantisation" not in found.facts
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


def test_what_was_checked_of_an_onnx_export(graph):
    checks = [{"name": "one", "passed": True}, {"name": "two", "passed": False}]
    report = {"passed": False, "checks": checks, "quantisation": {"mean_kl": 0.01, "top1": 0.97}}
    (graph / "verify.json").write_text(json.dumps(report))
    facts = show(graph).facts
    assert (facts["verified"], facts["checks"]) == ("failed", "1 of 2 hold, not: two")
    assert facts["quantisation"] == {"mean_kl": 0.01, "top1": 0.97}
    for odd in ({"checks": 3}, {"checks": [3]}, {"quantisation": [1]}, {"quantisation": {}}):
        (graph / "verify.json").write_text(json.dumps(report | odd))
        facts = show(graph).facts
        assert facts["checks"] in ("malformed", "1 of 2 hold, not: two")


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("config.json", "{}", "config.json has no spp_onnx"),
        ("config.json", "{", "is not valid JSON"),
        ("config.json", '{"spp_onnx": {"attention": 1, "precision": 2, "quant": 3}}', "malformed"),
        ("plan.json", "{", "is not valid JSON"),
    ],
)
def test_an_onnx_export_that_is_damaged(graph, file, text, problem):
    (graph / file).write_text(text)
    found = show(graph)
    assert (found.kind, found.facts) == ("ONNX export", {})
    assert problem in found.problems[0]
    assert file in found.problems[1]
    assert not any("\n" in line for line in found.problems)


def test_an_export_whose_plan_is_damaged(export):
    (export / "plan.json").write_text("{")
    found = show(export)
    assert (found.kind, found.facts) == ("slim checkpoint", {})
    assert "is not valid JSON" in found.problems[0]
    assert "plan.json: has 1 bytes" in found.problems[1]


@pytest.mark.parametrize("text", ["[]", "{", '{"passed": "yes"}'])
def test_a_report_that_is_none(export, text):
    (export / "verify.json").write_text(text)
    assert "verify.json" in show(export).facts["verified"]


def test_artifacts(tmp_path):
    def ones(*shape):
        return np.ones(shape, dtype=np.float32)

    made = Artifacts(
        fingerprint="f" * 64,
        domains=("chemistry", "math"),
        regimes=("in-domain",),
        weight=ones(3, 2, 8),
        bias=ones(3, 2),
        temperature=ones(1, 3),
        axes=ones(2, 8),
        importance={"head/energy": ones(2, 3, 4)},
        whitelist=((0, 1),),
        calibration=(("math", "1 + 1"),),
        manifest={"validation_accuracy": [0.5, 1.0, 1.0]},
    )
    written = write_artifacts(made, tmp_path)
    found = show(tmp_path)
    assert (found.kind, found.problems) == ("artifacts", None)
    assert found.facts == {
        "fingerprint": "f" * 64,
        "sha256": written.sha256,
        "domains": ["chemistry", "math"],
        "regimes": ["in-domain"],
        "layers": 3,
        "probed_layers": 3,
        "query_heads": 4,
        "hidden_size": 8,
        "importance": ["head/energy"],
        "whitelisted_heads": 1,
        "calibration_texts": 1,
        "validation_accuracy": [0.5, 1.0, 1.0],
    }


def test_axes_come_with_their_angles(tmp_path):
    def ones(*shape):
        return np.ones(shape, dtype=np.float32)

    axes = {
        "layer": 2,
        "dimensions": 5,
        "variance": 0.8,
        "candidates": ["math", "law"],
        "selected": ["math"],
        "cosines": [[1.0, -0.5], [-0.5, 1.0]],
        "separation": {"math": 3.5, "law": None},
    }
    made = Artifacts(
        fingerprint="",
        domains=("math",),
        regimes=("in-domain",),
        weight=ones(1, 1, 4),
        bias=ones(1, 1),
        temperature=ones(1, 1),
        axes=ones(1, 4),
        importance={"head/energy": ones(1, 1, 2)},
        whitelist=(),
        calibration=(),
        manifest={"axes": axes, "shrinkage": {"chosen": 0.25}},
    )
    write_artifacts(made, tmp_path)
    facts = show(tmp_path).facts
    assert facts["axes"] == {**axes, "angles": [[0.0, 120.0], [120.0, 0.0]]}
    assert facts["shrinkage"] == 0.25
    assert "scenario_weight" not in facts


@pytest.mark.parametrize(
    "cosines", [[[1.0]], [[1.0, "x"], [0, 1]], [[1.0, 2.0], [0, 1]], [1, 2], 3]
)
def test_axes_that_are_none_are_not_shown(tmp_path, cosines):
    axes = {"candidates": ["math", "law"], "cosines": cosines, "separation": {}}
    from spp_export.commands.show import _axes_facts

    assert _axes_facts(axes) is None


def test_a_dense_model(tmp_path):
    config = {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 2,
        "intermediate_size": 6,
        "vocab_size": 10,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    layer = {
        "self_attn.q_proj": (8, 8),
        "self_attn.k_proj": (4, 8),
        "self_attn.v_proj": (4, 8),
        "self_attn.o_proj": (8, 8),
        "mlp.gate_proj": (6, 8),
        "mlp.up_proj": (6, 8),
        "mlp.down_proj": (8, 6),
        "input_layernorm": (8,),
        "post_attention_layernorm": (8,),
    }
    shapes = {f"model.layers.0.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (10, 8), "model.norm.weight": (8,)}
    tensors = {name: np.ones(shape, dtype=np.float16) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    found = show(tmp_path)
    assert (found.kind, found.problems) == ("dense model", None)
    total = sum(tensor.size for tensor in tensors.values())
    expected = {
        "family": "llama",
        "dtype": "float16",
        "query_heads": 4,
        "kv_heads": 2,
        "parameters": total,
        "head_parameters": 2 * 8 * 8 + 2 * 4 * 8,
        "kv_bytes_per_token": 2 * 2 * 2 * 2,
    }
    assert expected.items() <= found.facts.items()
    assert found.facts["computes"] == "what Llama does"
    gone = {row["unit"]: (row["in_a_layer"], row["parameters"]) for row in found.facts["can_go"]}
    assert gone == {
        "query heads": ([4], 2 * 8 * 8),
        "KV groups": ([2], 2 * 4 * 8),
        "MLP channels": ([6], 3 * 6 * 8),
    }
    stays = {row["part"]: row["parameters"] for row in found.facts["stays"]}
    assert stays == {"embeddings": 80, "norms": 24}
    assert sum(stays.values()) + sum(count for _, count in gone.values()) == total


@pytest.mark.parametrize(
    ("name", "part", "refused"),
    [
        ("gpt_oss", "norms", {"gguf"}),
        ("opt", "biases of o and down", {"gguf"}),
        ("qwen2", "norms", set()),
        ("llava", "tower of vision", {"onnx", "gguf"}),
    ],
)
def test_what_a_model_can_become(name, part, refused, tmp_path):
    """What formats themselves say of a plan of each layout; of GGUF, but for its tokenizer."""
    make = make_dense if name in FAMILIES else make_seeing
    source = open_source(make(name, tmp_path / "dense"))
    facts = show(source.path).facts
    (row,) = (row for row in facts["stays"] if row["part"] == part)
    assert row["parameters"] > 0
    counted = [row["parameters"] for row in (*facts["can_go"], *facts["stays"])]
    assert sum(counted) == facts["parameters"]
    units = ["query heads", "KV groups", "experts" if source.family.experts else "MLP channels"]
    assert [row["unit"] for row in facts["can_go"]] == units
    inside = source.shape.expert_channels
    assert (facts["can_go"][-1].get("channels_of_each") == [inside]) == (inside > 0)
    can = {(row["format"], row["layout"]): row for row in facts["can_become"]}
    assert all("model" in can[each, "per-layer"]["how"] for each in refused)
    assert not any(can[each, layout]["can"] for each in refused for layout in LAYOUTS)
    assert can["safetensors", "per-layer"]["can"]
    ragged = source.shape.group_size > 1
    assert can["safetensors", "ragged"]["can"] == ragged
    if not refused:
        assert can["onnx", "ragged"]["how"].startswith("with --pad: ")
        assert "tokenizer" in can["gguf", "per-layer"]["how"]
    json.dumps(facts)


def test_a_model_of_the_cache_by_its_name(tmp_path, monkeypatch):
    place = make_dense("llama", tmp_path / "dense")
    names = []
    monkeypatch.setattr(
        "spp_export.commands.show.stored_model",
        lambda name: names.append(name) or (place if name == "org/model" else None),
    )
    assert show("org/model").facts["family"] == "llama"
    with pytest.raises(UsageError, match="no model of that name in the cache"):
        show("demo")
    assert names == ["org/model", DEMO_NAME]


def test_nothing_we_know(tmp_path):
    with pytest.raises(UsageError, match="no such file or directory"):
        show(tmp_path / "missing")
    with pytest.raises(UsageError, match="neither an export, an artifacts directory, a model nor"):
        show(tmp_path)
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(UsageError, match=r"text\.txt: expected a plan"):
        show(tmp_path / "text.txt")
    (tmp_path / "artifacts.json").write_text("{}")
    with pytest.raises(ArtifactsError):
        show(tmp_path)

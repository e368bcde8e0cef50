"""The corpus: small valid files of every kind that is fuzzed.

`python tests/fuzz/fuzz_seeds.py` writes them anew. `corpus/<target>/<entry>/` is one input: its
files lie together as a reader finds them.
"""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from spp_export.common.manifest import write_manifest
from spp_export.data.artifacts import Artifacts, write_artifacts
from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.models.checkpoint.dtypes import ELEMENT_BYTES
from spp_export.models.families import FAMILIES
from spp_export.models.shape import ModelShape
from spp_export.planning import LayerPlan, Plan, dense_plan
from spp_export.planning.latency import SIZES
from spp_export.slicing.config import slim_config

CORPUS = Path(__file__).parent / "corpus"
# Findings that were mended: `corpus/regressions/<target>/<name>/`.
REGRESSIONS = CORPUS / "regressions"
# Written by libraries whose next version may write other bytes.
NOT_REPRODUCED = ("onnx",)
SHAPE = ModelShape(
    model_type="llama",
    num_layers=2,
    hidden_size=8,
    query_heads=4,
    kv_heads=2,
    head_dim=4,
    channels=12,
    vocab_size=11,
    tied_embeddings=False,
    element_bytes=4,
)
LAYERS = (LayerPlan((0, 1), (0, 2)), LayerPlan((1,), (2, 3), (0, 2, 3, 7)))
Arrays = dict[str, NDArray[np.float32]]


def write_corpus(root: Path, without: tuple[str, ...] = ()) -> None:
    """All entries below `root`, which has none of them, but for those of some targets."""
    for name, make in _ENTRIES.items():
        if name.startswith(tuple(f"{target}/" for target in without)):
            continue
        entry = root / name
        entry.mkdir(parents=True)
        make(entry)


def dense(entry: Path, family: str = "llama", shards: int = 1, **config: Any) -> None:
    """A dense model of `SHAPE` without a tokenizer."""
    settings = {
        "model_type": family,
        "architectures": [FAMILIES[family].architecture],
        "num_hidden_layers": SHAPE.num_layers,
        "hidden_size": SHAPE.hidden_size,
        "num_attention_heads": SHAPE.query_heads,
        "num_key_value_heads": SHAPE.kv_heads,
        "head_dim": SHAPE.head_dim,
        "intermediate_size": SHAPE.channels,
        "vocab_size": SHAPE.vocab_size,
        "max_position_embeddings": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 500.0,
        "torch_dtype": "float32",
        **config,
    }
    _json(entry / "config.json", settings)
    shape = FAMILIES[family].read_shape(settings, element_bytes=4)
    rng = np.random.default_rng(0)
    tensors: Arrays = {
        spec.name: (0.3 * rng.standard_normal(spec.shape)).astype(np.float32)
        for spec in FAMILIES[family].tensors(shape, shape.layers)
    }
    if shards == 1:
        save_file(tensors, entry / "model.safetensors", {"format": "pt"})
        return
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        save_file(part, entry / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _json(entry / "model.safetensors.index.json", index)


def artifacts(shape: ModelShape = SHAPE, fingerprint: str = "f" * 64) -> Artifacts:
    """Of a model of these sizes."""
    rng = np.random.default_rng(0)

    def array(*sizes: int) -> NDArray[np.float32]:
        return rng.random(sizes, dtype=np.float32) + np.float32(0.5)

    layers, hidden = shape.num_layers, shape.hidden_size
    return Artifacts(
        fingerprint=fingerprint,
        domains=("chemistry", "math"),
        regimes=("in-domain", "cross-domain"),
        weight=array(layers, 2, hidden),
        bias=array(layers, 2),
        temperature=array(2, layers),
        axes=array(2, hidden),
        importance={
            "head/energy": array(2, layers, shape.query_heads),
            "channel/energy": array(2, layers, shape.channels),
        },
        whitelist=((0, 1), (1, 3)),
        calibration=(("math", "What is 2+2?\nShow it."), ("chemistry", "Säure \u2028")),
        manifest={
            "seed": 0,
            "probe_layers": [0, 1],
            "regime_choice": {"known": 0.3, "share": 0.2},
            "shrinkage": {"chosen": 0.5},
            "scenario_weight": {"chosen": 0.25},
            "axes": {
                "layer": 1,
                "dimensions": 2,
                "variance": 0.5,
                "candidates": ["chemistry", "math"],
                "cosines": [[1, 0.1], [0.1, 1]],
                "separation": {"math": 3.5},
                "selected": ["math"],
            },
        },
    )


def plan(fingerprint: str = "f" * 64, **changes: Any) -> Plan:
    """A plan for `SHAPE` with some of everything in it."""
    whole = Plan(
        fingerprint,
        "org/model",
        "per-layer",
        "none",
        LAYERS,
        scenario={"name": "chémie", "sha256": "00"},
        diagnosis={"mixture": {"chemistry": 0.75, "math": 0.25}, "breadth": 0.8, "regime": "x"},
        budget={"asked": {"keep": 0.8}, "realised": {"keep": 0.79}},
        criterion={"name": "energy"},
        policy={"name": "exact"},
        predicted={"parameters": 1000, "file_bytes": 4000, "kv_bytes_per_token": 64},
        versions={"spp": "0.1.0"},
    )
    return replace(whole, **changes)


def latency_table() -> dict[str, Any]:
    """Of a model of `SHAPE`."""

    def times(seconds: float) -> dict[str, float]:
        return {"seconds": seconds, "p20": seconds / 2, "p80": 2 * seconds}

    shapes = [(1, 1), (2, 1), (2, 2), (4, 2)]
    return {
        "schema_version": 1,
        "model": {"name": "tiny", **{name: getattr(SHAPE, name) for name in SIZES}},
        "phase": "decode",
        "batch": 2,
        "context": 33,
        "device": "cpu",
        "dtype": "float32",
        "attention": [{"query_heads": q, "kv_heads": kv, **times(1e-5 * q)} for q, kv in shapes],
        "mlp": [{"channels": width, **times(1e-6 * width)} for width in (4, 8, 12)],
        "rest": times(3e-5),
    }


def _dtypes(entry: Path) -> None:
    """A tensor of every type that the format names, none of them aligned for the next."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for index, (dtype, size) in enumerate(ELEMENT_BYTES.items()):
        shape = ([], [0, 3], [2], [1, 3])[index % 4]
        begin, end = end, end + size * int(np.prod(shape))
        header[f"t{index}"] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + bytes(range(end))
    (entry / "model.safetensors").write_bytes(content)


def _plan(**changes: Any) -> Callable[[Path], None]:
    def make(entry: Path) -> None:
        written = plan(**changes).to_json()
        (entry / "plan.json").write_text(written, encoding="utf-8")

    return make


def _scenario(name: str, content: str) -> Callable[[Path], None]:
    def make(entry: Path) -> None:
        (entry / name).write_bytes(content.encode())

    return make


def _artifacts(entry: Path) -> None:
    write_artifacts(artifacts(), entry)


def _manifest(entry: Path) -> None:
    (entry / "sub").mkdir()
    for name, content in (("a.txt", b"a"), ("b é.txt", b""), ("sub/c.bin", b"\0\xff")):
        (entry / name).write_bytes(content)
    write_manifest(entry)


def _onnx(attention: str) -> Callable[[Path], None]:
    def make(entry: Path) -> None:
        from spp_export.formats.onnx import OnnxOptions
        from spp_export.formats.onnx.write import write_onnx

        with tempfile.TemporaryDirectory() as folder:
            dense(Path(folder), vocab_size=67)
            write_onnx(Path(folder), entry, OnnxOptions(attention=attention))

    return make


def _slim(entry: Path) -> None:
    """What says something about a slim checkpoint, without its weights."""
    with tempfile.TemporaryDirectory() as folder:
        dense(Path(folder))
        source = open_source(Path(folder), "org/model")
    made = plan(source.fingerprint)
    (entry / "plan.json").write_text(made.to_json(), encoding="utf-8")
    shapes = made.written_shapes(source.shape)
    config = slim_config(source.config, source.family, source.shape, shapes, "per-layer")
    _json(entry / "config.json", config)
    check = {"name": "parity", "passed": True, "value": 1e-6, "limit": 1e-4, "detail": "x"}
    report = {"passed": True, "checks": [check], "quality": {"ratio": 1.01}}
    _json(entry / "verify.json", report | {"quantisation": {"mean_kl": 0.01, "top1": 0.9}})
    write_manifest(entry)


def _shown_onnx(entry: Path) -> None:
    _slim(entry)
    (entry / "manifest.json").unlink()
    (entry / "model.onnx").write_bytes(b"")
    said = {"attention": "gqa", "precision": "fp32", "quant": None, "version": 1}
    config = json.loads((entry / "config.json").read_text())
    _json(entry / "config.json", {**config, "spp_onnx": said})
    write_manifest(entry)


def _dense_plan(entry: Path) -> None:
    text = dense_plan(SHAPE, "f" * 64, "tiny").to_json()
    (entry / "plan.json").write_text(text, encoding="utf-8")


_LINES = (
    '{"prompt": "What is an acid?", "answer": ["H+", "x"]}\n\n{"text": "Säure \\ud83d\\ude00"}\n'
)
_PUBLISHED = json.dumps(
    [
        {
            "topic_description": "acids",
            "turns": [
                {"query": "What is 2+2?", "answer": "4", "task_type": "math"},
                {"prompt": "And 3?", "answer": ["6"]},
            ],
        },
        {"turns": [{"query": "And 4?"}]},
    ]
)
_OLD_ROPE = {"rope_scaling": {"type": "linear", "factor": 2.0}}
_NEW_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
_ENTRIES: dict[str, Callable[[Path], None]] = {
    "header/model": dense,
    "header/every-dtype": _dtypes,
    "index/two-shards": lambda entry: dense(entry, shards=2, tie_word_embeddings=True),
    "config/llama": lambda entry: dense(entry, attention_bias=True, **_OLD_ROPE),
    "config/mistral": lambda entry: dense(entry, "mistral", sliding_window=6),
    "config/qwen2": lambda entry: dense(entry, "qwen2", tie_word_embeddings=True),
    "config/qwen3": lambda entry: dense(entry, "qwen3", **_NEW_ROPE),
    "plan/per-layer": _plan(),
    "plan/padded": _plan(layout="ragged", padded=True, layers=(LayerPlan((0, 1), (0, 1, 2)),) * 2),
    "plan/dense": _dense_plan,
    "manifest/nested": _manifest,
    "artifacts/tiny": _artifacts,
    "scenario/paragraphs": _scenario("s.txt", "\ufeffWhat is an acid?\r\n\nÄ\nb\n\n\n c \n"),
    "scenario/lines": _scenario("s.jsonl", _LINES),
    "scenario/published": _scenario("s.json", _PUBLISHED),
    "scenario/no-suffix": _scenario("s", _LINES),
    "profile/tiny": lambda entry: _json(entry / "t.json", latency_table()),
    "onnx/gqa": _onnx("gqa"),
    "onnx/standard": _onnx("standard"),
    "show/slim": _slim,
    "show/onnx": _shown_onnx,
    "show/artifacts": _artifacts,
}


def _json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    for folder in CORPUS.iterdir() if CORPUS.exists() else ():
        if folder != REGRESSIONS:
            shutil.rmtree(folder)
    write_corpus(CORPUS)

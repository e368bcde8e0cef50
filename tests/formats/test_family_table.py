"""docs/families.md, cell by cell: a file that engines load and that computes what transformers
does, or the command's refusal for the reason that the table gives."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from factories import write_tokenizer
from family_models import KNOWN, load, make_dense, make_slim, settings_of
from numpy.typing import NDArray
from old_transformers import ABSENT, since_5
from pairs import few

from spp_export.common.errors import SppError
from spp_export.evaluation.contract import (
    drop_experts,
    only_existing,
    random_layers,
    uniform_layers,
)
from spp_export.formats.gguf import GgufOptions
from spp_export.formats.gguf.architecture import architecture_of
from spp_export.formats.gguf.contents import gguf_contents
from spp_export.formats.gguf.header import read_gguf
from spp_export.formats.gguf.llama_cpp import LlamaCpp
from spp_export.formats.gguf.weights import GgufWeights
from spp_export.formats.gguf.write import write_gguf
from spp_export.formats.onnx import OnnxOptions
from spp_export.formats.onnx.write import write_onnx
from spp_export.formats.registry import FORMATS
from spp_export.models.checkpoint.checkpoint import Checkpoint, open_checkpoint, open_source
from spp_export.models.checkpoint.reader import read_float
from spp_export.models.families import FAMILIES
from spp_export.models.shape import Layout
from spp_export.planning import LayerPlan

sys.path.insert(0, str(Path(__file__).parent / "gguf"))
from gguf_cases import add_merges

VOCAB, PROMPT, NEW = 263, list(range(5, 42)), 6
LAYOUTS: tuple[Layout, ...] = ("per-layer", "uniform")
CELLS = [
    (name, format_name, layout)
    for name in KNOWN
    for format_name in ("onnx", "gguf")
    for layout in LAYOUTS
]
# What the tests of a family add to its config and llama.cpp does not have.
WITHOUT: dict[str, dict[str, Any]] = {
    "cohere": {"use_qk_norm": False},
    "falcon": {"multi_query": True, "bias": False},
}


def refusal(name: str, format_name: str, layout: Layout) -> str | None:
    return FORMATS[format_name].refusal(FAMILIES[name], layout)


WRITTEN = [cell for cell in CELLS if refusal(*cell) is None]
REFUSED = [cell for cell in CELLS if refusal(*cell) is not None]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory):
    """A family's dense model with a tokenizer, made once. Its windows are as long as its context,
    which llama.cpp's architectures can do without."""
    place = tmp_path_factory.mktemp("dense")

    @cache
    def made(name: str) -> Checkpoint:
        settings = settings_of(name, 16, VOCAB)
        more = dict(WITHOUT.get(name, {}))
        if getattr(settings, "sliding_window", None):
            more["sliding_window"] = settings.max_position_embeddings
        path = make_dense(name, place / name / "dense", 16, VOCAB, **more)
        return open_source(path)

    return made


def some_layers(source: Checkpoint, seed: int) -> tuple[LayerPlan, ...]:
    plan = random_layers(source.shape, seed, channels=bool(source.family.down))
    return only_existing(plan, source.shape)


def size(layer: LayerPlan) -> tuple[int, ...]:
    return len(layer.query_heads), len(layer.kv_heads), len(layer.channels or ())


def slim_of(source: Checkpoint, format_name: str, layout: Layout, target: Path) -> Path:
    """A slim model, of which goes what can."""
    units = FORMATS[format_name].uniform_units(source.family)
    shape, layers = source.shape, None
    if layout == "per-layer":
        plans = (some_layers(source, seed) for seed in itertools.count(3))
        layers = next(plan for plan in plans if len(set(map(size, plan))) > 1)
    elif units != "all":
        width = 10 if units == "channels" else None
        layers = uniform_layers(
            shape, 3, kv_heads=shape.kv_heads, group_size=shape.group_size, channels=width
        )
        if units == "experts":
            layers = drop_experts(layers, shape, 3, alike=True)
    slim = make_slim(source, layout, target, layers).slim
    write_tokenizer(slim)
    return add_merges(slim)


def truth(checkpoint: Path, ids: list[int]) -> torch.Tensor:
    """Logits [S,V] in float64."""
    with torch.no_grad():
        logits: torch.Tensor = load(checkpoint)(torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def write(format_name: str, slim: Path, out: Path) -> None:
    if format_name == "onnx":
        write_onnx(slim, out, OnnxOptions())
        return
    decoder = open_checkpoint(slim)
    write_gguf(decoder, gguf_contents(decoder, GgufOptions(), "tiny"), out)


def by_onnx(slim: Path, out: Path) -> Iterator[tuple[float, float]]:
    write_onnx(slim, out, OnnxOptions("gqa-bias"))
    session = onnxruntime.InferenceSession(out / "model.onnx")
    ids: NDArray[np.int64] = np.asarray([PROMPT])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feeds["position_ids"] = np.arange(len(PROMPT))[None]
    for value in session.get_inputs():
        if value.name.startswith("past"):
            feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    found = session.run(["logits"], feeds)[0][0]
    expected = truth(slim, PROMPT).numpy()
    limit = 64 * np.finfo(np.float32).eps * max(1.0, np.abs(expected).max())
    yield float(np.abs(found - expected).max()), float(limit)


def by_llama_cpp(slim: Path, out: Path) -> Iterator[tuple[float, float]]:
    decoder = open_checkpoint(slim)
    contents = gguf_contents(decoder, GgufOptions("fp32"), "tiny")
    write_gguf(decoder, contents, out)
    weights = GgufWeights(read_gguf(out), contents.tensors)
    assert set(weights.names) == set(decoder.tensors)
    for name in weights.names:
        whole = np.float32(read_float(decoder.tensors[name]))
        assert np.array_equal(weights.stored(name), weights.changed(name, whole)), name
        assert np.allclose(weights.read(name), whole, rtol=1e-5, atol=1e-6), name
    with closing(LlamaCpp(out / "model.gguf", 64, 1)) as model:
        steps = model.generate(PROMPT, NEW, VOCAB)
    ids = PROMPT + [step.token for step in steps]
    expected = truth(slim, ids[:-1])[-NEW:].log_softmax(-1)
    # Its GELU comes out of a table in half precision.
    limit = 5e-3 if contents.architecture.activation.startswith("gelu") else 2e-4
    for row, step in zip(expected, steps, strict=True):
        yield max(abs(float(row[token]) - value) for token, value in step.likeliest), limit


def name_and_format(row: tuple[str, str, str]) -> set[str]:
    """Every family in GGUF, where it can be; ONNX has tests of every family of its own."""
    name, format_name, layout = row
    return {f"{name} {format_name}"} if format_name == "gguf" else {f"{format_name} {layout}"}


@pytest.mark.parametrize(("name", "format_name", "layout"), few(WRITTEN, name_and_format))
def test_what_the_table_says_is_written(dense, name, format_name, layout, tmp_path: Path) -> None:
    if format_name == "gguf":
        pytest.importorskip("xllamacpp")
    slim, out = slim_of(dense(name), format_name, layout, tmp_path / "slim"), tmp_path / "out"
    out.mkdir()
    compared = by_onnx if format_name == "onnx" else by_llama_cpp
    for difference, limit in compared(slim, out):
        assert difference <= limit


@pytest.mark.parametrize(
    ("name", "format_name", "layout"), few(REFUSED, lambda cell: {refusal(*cell)})
)
def test_what_the_table_says_is_refused(dense, name, format_name, layout, tmp_path: Path) -> None:
    """Before anything is written, for the reason of the table."""
    reason, source = refusal(name, format_name, layout), dense(name)
    if layout == "uniform" and not source.family.uniform:
        whole = {"kv_heads": source.shape.kv_heads, "group_size": source.shape.group_size}
        layers = uniform_layers(source.shape, 3, **whole, channels=10)
        with pytest.raises(SppError, match="layout 'uniform'"):
            make_slim(source, layout, tmp_path / "slim", layers)
        return
    # A dense model is uniform.
    slim = source.path
    if layout != "uniform":
        slim = slim_of(source, format_name, layout, tmp_path / "slim")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(SppError) as caught:
        write(format_name, slim, out)
    assert str(reason) in str(caught.value)
    assert not list(out.iterdir())


@since_5(ABSENT)
def test_mup_folds_into_a_llama_where_no_norms_come_after(tmp_path: Path) -> None:
    """As HyperCLOVA X has its multipliers."""
    path = make_dense("hyperclovax", tmp_path / "dense", 16, VOCAB, use_post_norm=False)
    source = open_source(path)
    slim, out = slim_of(source, "gguf", "per-layer", tmp_path / "slim"), tmp_path / "out"
    out.mkdir()
    assert architecture_of(open_checkpoint(slim)).name == "deci"
    for difference, limit in by_llama_cpp(slim, out):
        assert difference <= limit

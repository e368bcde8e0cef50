"""Every family, slim and dense, in every form: ONNX Runtime gives the PyTorch model's logits."""

from __future__ import annotations

import itertools
from pathlib import Path

import factories
import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx_graphs import Graph
from pairs import few, of_family

from spp_export.formats.onnx import OnnxOptions
from spp_export.formats.onnx.options import ATTENTIONS, Attention
from spp_export.formats.onnx.write import write_onnx
from spp_export.models.loader import load_slim

pytestmark = pytest.mark.thinned(most=4)

BY_NAME = {case.name: case for case in factories.CASES}
_PROMPT, _STEPS = 19, 6


def _write(checkpoint: Path, target: Path, options: OnnxOptions) -> Path:
    target.mkdir()
    write_onnx(checkpoint, target, options)
    return target


def _slim(case: factories.Case, tmp_path: Path) -> Path:
    dense = case.make(tmp_path)
    layers = factories.random_layers(factories.shape_of(dense), seed=7)
    return factories.write_slim(tmp_path / "slim", dense, layers)


def _ids(rows: int, count: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(3, factories.VOCAB, (rows, count))


def _truth(checkpoint: Path, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Logits [B,S,V] in float64."""
    model = load_slim(checkpoint, dtype=torch.float64)
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(ids), use_cache=False).logits
    result: NDArray[np.float64] = logits.numpy()
    return result


def _assert_close(found: NDArray[np.float64], truth: NDArray[np.float64]) -> None:
    """Within float32's rounding of sums of this size, done in another order than PyTorch's."""
    limit = 64 * np.finfo(np.float32).eps * np.abs(truth).max()
    assert np.abs(found - truth).max() <= limit


@pytest.mark.parametrize(
    ("case", "attention"), few(itertools.product(factories.CASES, ATTENTIONS), of_family), ids=str
)
def test_slim_graph_gives_pytorchs_logits(
    case: factories.Case, attention: Attention, tmp_path: Path
) -> None:
    slim = _slim(case, tmp_path)
    directory = _write(slim, tmp_path / "onnx", OnnxOptions(attention))
    onnx.checker.check_model(directory / "model.onnx", full_check=attention == "standard")
    graph, count = Graph(directory), _PROMPT + _STEPS
    ids = _ids(1, count)
    truth = _truth(slim, ids)

    ones = np.ones((1, count), np.int64)
    logits, past = graph.run(ids[:, :_PROMPT], ones[:, :_PROMPT], graph.past(1))
    _assert_close(logits, truth[:, :_PROMPT])
    for step in range(_PROMPT, count):
        logits, past = graph.run(ids[:, step : step + 1], ones[:, : step + 1], past)
        _assert_close(logits[:, 0], truth[:, step])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", ["llama-gqa-bias", "mistral-window-tied", "qwen3-gqa-tied"])
def test_rows_of_unequal_length(name: str, attention: Attention, side: str, tmp_path: Path) -> None:
    slim = _slim(BY_NAME[name], tmp_path)
    graph = Graph(_write(slim, tmp_path / "onnx", OnnxOptions(attention)))
    ids, mask = _ids(2, _PROMPT), np.ones((2, _PROMPT), np.int64)
    mask[1, : _PROMPT // 2 if side == "left" else 0] = 0
    mask[1, _PROMPT if side == "left" else _PROMPT // 2 :] = 0
    if attention == "gqa" and side == "left":
        with pytest.raises(Exception, match="left_padding_needs_gqa_bias"):
            graph.run(ids, mask, graph.past(2))
        return
    logits, past = graph.run(ids, mask, graph.past(2))
    new = _ids(2, 1, seed=1)
    after, _ = graph.run(new, np.concatenate([mask, np.ones_like(new)], 1), past)
    for row in range(2):
        real = mask[row] == 1
        truth = _truth(slim, np.concatenate([ids[row][real], new[row]])[None])[0]
        _assert_close(logits[row][real], truth[:-1])
        _assert_close(after[row, 0], truth[-1])


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", ["llama-gqa-bias", "qwen3-mqa-bias", "mistral-window-tied"])
def test_half_precision_stays_within_its_rounding(
    name: str, attention: Attention, tmp_path: Path
) -> None:
    slim = _slim(BY_NAME[name], tmp_path)
    graph = Graph(_write(slim, tmp_path / "onnx", OnnxOptions(attention, precision="fp16")))
    ids = _ids(1, _PROMPT)
    truth = _truth(slim, ids)
    half = load_slim(slim, dtype=torch.float16)
    with torch.no_grad():
        same = half(input_ids=torch.from_numpy(ids), use_cache=False).logits.double().numpy()
    logits, _ = graph.run(ids, np.ones_like(ids), graph.past(1))
    limit = 4 * np.abs(same - truth).max() + 4 * np.finfo(np.float16).eps * np.abs(truth).max()
    assert np.abs(logits - truth).max() <= limit


@pytest.mark.parametrize("case", factories.CASES[::4], ids=lambda case: case.name)
def test_dense_and_uniform_checkpoints(case: factories.Case, tmp_path: Path) -> None:
    dense = case.make(tmp_path)
    shape = factories.shape_of(dense)
    layers = factories.uniform_layers(shape, 3, kv_heads=shape.kv_heads, group_size=1, channels=40)
    uniform = factories.write_slim(tmp_path / "slim", dense, layers, "uniform")
    for number, checkpoint in enumerate((dense, uniform)):
        graph = Graph(_write(checkpoint, tmp_path / f"onnx{number}", OnnxOptions()))
        ids = _ids(1, _PROMPT)
        logits, _ = graph.run(ids, np.ones_like(ids), graph.past(1))
        _assert_close(logits, _truth(checkpoint, ids))


def test_tied_embedding_is_stored_once_and_bf16_is_written(tmp_path: Path) -> None:
    slim = _slim(BY_NAME["llama-mha-tied"], tmp_path)
    stored = (slim / "model.safetensors").stat().st_size
    sizes = {}
    for precision in ("fp32", "bf16"):
        directory = _write(slim, tmp_path / precision, OnnxOptions(precision=precision))
        onnx.checker.check_model(directory / "model.onnx")
        sizes[precision] = sum(path.stat().st_size for path in directory.glob("model.onnx*"))
    tables = 2 * 1024 * 8 * 4
    assert sizes["fp32"] < stored + tables + 30_000
    assert sizes["bf16"] < 0.6 * sizes["fp32"]


def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    slim = _slim(BY_NAME["qwen2-gqa-tied"], tmp_path)
    one, other = (_write(slim, tmp_path / name, OnnxOptions()) for name in ("one", "other"))
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name

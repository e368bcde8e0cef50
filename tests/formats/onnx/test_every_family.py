"""Families of the table as graphs: what each computes otherwise than Llama, in ONNX Runtime."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from factories import random_layers
from family_models import FORMS, KNOWN, emptied, family_name, load, make_dense, make_slim
from numpy.typing import NDArray
from old_transformers import ABSENT, CAPPED, FLOAT64, but_in_old, since_5
from onnx_graphs import (
    Graph,
    assert_close,
    assert_prompt_and_steps,
    assert_weights_are_read_back,
    ids,
)

from spp_export.common.errors import ModelError
from spp_export.evaluation.contract import only_existing
from spp_export.formats.onnx import OnnxOptions
from spp_export.formats.onnx.options import ATTENTIONS, Attention
from spp_export.formats.onnx.read import GraphWeights
from spp_export.formats.onnx.structure import difference
from spp_export.formats.onnx.write import write_onnx
from spp_export.formats.registry import FORMATS
from spp_export.models.checkpoint.checkpoint import open_checkpoint, open_source
from spp_export.models.checkpoint.reader import read_float
from spp_export.models.families import FAMILIES

ONNX = FORMATS["onnx"]
NAMES = [*KNOWN, *(name for name in FORMS if family_name(name) in KNOWN)]
# What no record tells of: its slopes are rounded to bfloat16.
NOT_TOLD = ("falcon-rw",)
WRITTEN = [
    name
    for name in NAMES
    if name not in NOT_TOLD and not ONNX.refusal(FAMILIES[family_name(name)], "per-layer")
]
# What stock models of transformers 4 do otherwise.
UNABLE = {
    "apertus": [since_5("its activation computes in bfloat16, whatever was asked")],
    "opt-bare": [since_5("it makes no norms without weights")],
    **{
        name: [since_5(FLOAT64)]
        for name in NAMES
        if family_name(name) in ("mpt", "glm4_moe", "dots1")
    },
}
# Every family in one form, slowly in the others.
CASES = [
    pytest.param(
        name,
        form,
        marks=[*UNABLE.get(name, ()), *([pytest.mark.slow] if (number + other) % 3 else ())],
        id=f"{name}-{form}",
    )
    for number, name in enumerate(WRITTEN)
    for other, form in enumerate(ATTENTIONS)
]
# Those whose layers may keep nothing; of the commoner forms one, and the others slowly.
_USUAL = ("llama", "gemma2", "cohere", "cohere2", "granite", "starcoder2", "qwen3")
EMPTY = [
    pytest.param(
        name,
        ATTENTIONS[number % 3],
        marks=[*UNABLE.get(name, ()), *(() if name in _USUAL else [pytest.mark.slow])],
        id=name,
    )
    for number, name in enumerate(WRITTEN)
    if not FAMILIES[family_name(name)].no_empty_layers("heads")
]
_PROMPT, _COUNT = 13, 17


@pytest.fixture(scope="module")
def slim(tmp_path_factory: pytest.TempPathFactory):
    """A per-layer model of a family whose heads ONNX Runtime's own rotary takes, made once."""
    place = tmp_path_factory.mktemp("slim")

    @cache
    def made(name: str, layout: str = "per-layer") -> Path:
        source = open_source(make_dense(name, place / name / layout / "dense", head_dim=16))
        return make_slim(source, layout, place / name / layout / "slim").slim

    return made


def truth(checkpoint: Path, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Logits [B,S,V] in float64."""
    with torch.no_grad():
        logits = load(checkpoint, **CAPPED)(torch.from_numpy(tokens), use_cache=False).logits
    result: NDArray[np.float64] = logits.numpy()
    return result


def written(checkpoint: Path, out: Path, attention: Attention) -> Graph:
    out.mkdir()
    write_onnx(checkpoint, out, OnnxOptions(attention))
    return Graph(out)


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_a_graph_gives_the_logits_of_transformers(slim, name, attention, tmp_path: Path) -> None:
    assert_the_same(slim(name), attention, tmp_path)


@pytest.mark.parametrize(("name", "attention"), EMPTY)
def test_layers_may_have_no_attention_and_no_mlp(name, attention, tmp_path: Path) -> None:
    """The first, the last, and both at once; what is left of them are biases, multiplied or
    normalised as the family does."""
    source = open_source(make_dense(name, tmp_path / "dense", head_dim=16, layers=4))
    family, shape = source.family, source.shape
    layers = only_existing(random_layers(shape, 3, channels=bool(family.down)), shape)
    layers = emptied(layers, (0, 2), () if family.no_empty_layers("channels") else (2, 3))
    checkpoint = make_slim(source, "per-layer", tmp_path / "slim", layers).slim
    assert_the_same(checkpoint, attention, tmp_path)


def assert_the_same(checkpoint: Path, attention: Attention, tmp_path: Path) -> None:
    """A prompt, then token by token with the cache; and the weights can be read back."""
    graph = written(checkpoint, tmp_path / "onnx", attention)
    tokens = ids(1, _COUNT)
    assert_prompt_and_steps(graph, tokens, truth(checkpoint, tokens), _PROMPT)
    onnx.checker.check_model(tmp_path / "onnx" / "model.onnx")
    decoder = open_checkpoint(checkpoint)
    assert difference(tmp_path / "onnx", decoder, OnnxOptions(attention)) is None
    assert_weights_are_read_back(tmp_path / "onnx", decoder)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "name", but_in_old(["gpt2", "bloom", "gemma2", "ministral3", "glm"], {"ministral3"}, ABSENT)
)
def test_rows_of_unequal_length(slim, name: str, side: str, tmp_path: Path) -> None:
    """Positions, distances and windows count real tokens."""
    checkpoint = slim(name)
    graph = written(checkpoint, tmp_path / "onnx", "gqa" if side == "right" else "gqa-bias")
    tokens, new = ids(2, 11), ids(2, 1, seed=1)
    mask = np.ones_like(tokens)
    mask[1, slice(0, 5) if side == "left" else slice(6, 11)] = 0
    logits, past = graph.run(tokens, mask, graph.past(2))
    grown = np.concatenate([mask, np.ones_like(new)], 1)
    if side == "right":  # each row goes on right behind its own last token
        grown = np.sort(grown, axis=1)[:, ::-1].copy()
    after, _ = graph.run(new, grown, past)
    for row in range(2):
        real = mask[row] == 1
        expected = truth(checkpoint, np.concatenate([tokens[row][real], new[row]])[None])[0]
        assert_close(logits[row][real], expected[:-1])
        assert_close(after[row, 0], expected[-1])


@pytest.mark.parametrize("name", ["gemma2", "phi3", "gpt2", "opt-350m"])
@pytest.mark.parametrize("quant", ["int8", "int8-dynamic"])
def test_quantised_weights_can_be_read_back(slim, name: str, quant, tmp_path: Path) -> None:
    """Near to what was stored, each in its place."""
    checkpoint, decoder = slim(name), open_checkpoint(slim(name))
    (tmp_path / "onnx").mkdir()
    write_onnx(checkpoint, tmp_path / "onnx", OnnxOptions(quant=quant))
    weights = GraphWeights(tmp_path / "onnx", decoder.family, decoder.shape, decoder.layers)
    for spec in weights.specs:
        stored = read_float(decoder.tensors[spec.name])
        lost = np.linalg.norm(weights.read(spec.name) - stored) / np.linalg.norm(stored)
        assert lost <= (0.05 if weights.in_few_bits(spec) else 1e-6), spec.name


@pytest.mark.parametrize("name", NOT_TOLD)
def test_what_no_record_tells_is_refused(name: str, tmp_path: Path) -> None:
    source = open_source(make_dense(name, tmp_path / "dense"))
    (tmp_path / "onnx").mkdir()
    with pytest.raises(ModelError, match="ONNX does not know scores biased by distance"):
        write_onnx(source.path, tmp_path / "onnx", OnnxOptions())
    assert not list((tmp_path / "onnx").iterdir())

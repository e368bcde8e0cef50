"""MLPs with experts as graphs, against the masked dense model: another number of experts in each
layer, of another width, with another number of heads."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from family_models import Pair, make_dense, make_slim
from numpy.typing import NDArray
from old_transformers import since_5
from onnx_graphs import (
    Graph,
    assert_close,
    assert_prompt_and_steps,
    assert_weights_are_read_back,
    ids,
)

from spp_export.common.errors import ModelError
from spp_export.evaluation.contract import (
    drop_experts,
    load_exact,
    narrow_experts,
    only_existing,
    random_layers,
    uniform_layers,
)
from spp_export.formats.onnx import OnnxOptions
from spp_export.formats.onnx.options import ATTENTIONS, Attention
from spp_export.formats.onnx.structure import difference
from spp_export.formats.onnx.write import write_onnx
from spp_export.models.checkpoint.checkpoint import open_checkpoint, open_source
from spp_export.models.loader import load_slim

pytestmark = since_5("dropping experts needs transformers 5")
_PROMPT, _COUNT = 11, 15
# By a name of their own, models of experts and what is special about each.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 6}),
    "mixtral-gelu": ("mixtral", {"num_local_experts": 5, "hidden_act": "gelu"}),
    "mixtral-one": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 1}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 6, "norm_topk_prob": False}),
    "qwen3_moe-normed": ("qwen3_moe", {"num_experts": 6, "norm_topk_prob": True}),
    "qwen3_moe-dense": ("qwen3_moe", {"num_experts": 6, "mlp_only_layers": [1]}),
    "qwen2_moe": ("qwen2_moe", {"num_experts": 6}),
    "glm4_moe": ("glm4_moe", {"n_routed_experts": 6, "routed_scaling_factor": 1.5}),
    "glm4_moe-groups": ("glm4_moe", {"n_routed_experts": 8, "n_group": 2, "topk_group": 1}),
    "dots1": ("dots1", {"n_routed_experts": 6, "norm_topk_prob": False}),
    "ernie4_5_moe": ("ernie4_5_moe", {"moe_num_experts": 6}),
    "ernie4_5_moe-floor": ("ernie4_5_moe", {"moe_num_experts": 6, "moe_norm_min": 0.9}),
    "minimax_m2": ("minimax_m2", {"num_local_experts": 6}),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 6, "swiglu_limit": 0.5}),
    "olmoe": ("olmoe", {"num_experts": 6}),
    "granitemoe": ("granitemoe", {"num_local_experts": 6}),
}
CASES = [
    pytest.param(
        name, form, id=f"{name}-{form}", marks=[pytest.mark.slow] if (one + other) % 3 else ()
    )
    for one, name in enumerate(MODELS)
    for other, form in enumerate(ATTENTIONS)
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory):
    """A model and a slice of it, made once."""
    place = tmp_path_factory.mktemp("experts")

    @cache
    def made(name: str) -> Pair:
        family, more = MODELS[name]
        dense = make_dense(family, place / name / "dense", head_dim=16, layers=4, **more)
        source = open_source(dense)
        shape = source.shape
        layers = narrow_experts(drop_experts(some_layers(source), shape, 5), shape, 5)
        layers = only_existing(layers, shape)
        return make_slim(source, "per-layer", place / name / "slim", layers)

    return made


def some_layers(source: Any) -> Any:
    return random_layers(source.shape, 5, channels=bool(source.family.down))


def truth(pair: Pair, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Logits of the masked dense model [B,S,V] in float64."""
    with pair.masked() as model, torch.no_grad():
        logits: NDArray[np.float64] = model(
            torch.from_numpy(tokens), use_cache=False
        ).logits.numpy()
    return logits


def graph_of(checkpoint: Path, out: Path, options: OnnxOptions) -> Graph:
    out.mkdir()
    write_onnx(checkpoint, out, options)
    return Graph(out)


def operators(directory: Path) -> set[str]:
    return {
        node.op_type
        for node in onnx.load(directory / "model.onnx", load_external_data=False).graph.node
    }


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_a_graph_gives_the_masked_dense_models_logits(
    pairs: Any, name: str, attention: Attention, tmp_path: Path
) -> None:
    """A prompt, then token by token with the cache, and the weights can be read back."""
    pair, out = pairs(name), tmp_path / "onnx"
    decoder = open_checkpoint(pair.slim)
    counts = [count for count in decoder.shape.experts_in(decoder.layers) if count]
    assert len(set(counts)) > 1
    assert len({layer.kv_heads for layer in decoder.layers}) > 1
    assert len({layer.dropped_channels for layer in decoder.layers}) > 1
    graph = graph_of(pair.slim, out, OnnxOptions(attention))
    by_operator = attention != "standard" and "gelu" not in name
    assert ("MoE" in operators(out)) == by_operator
    tokens = ids(1, _COUNT)
    assert_prompt_and_steps(graph, tokens, truth(pair, tokens), _PROMPT)
    onnx.checker.check_model(out / "model.onnx", full_check=attention == "standard")
    assert difference(out, decoder, OnnxOptions(attention)) is None
    assert_weights_are_read_back(out, decoder)


@pytest.mark.parametrize("attention", ["gqa-bias", "standard"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_rows_padded_on_the_left(
    pairs: Any, name: str, attention: Attention, tmp_path: Path
) -> None:
    """What is padding is routed, too, and must change nothing."""
    pair = pairs(name)
    graph = graph_of(pair.slim, tmp_path / "onnx", OnnxOptions(attention))
    tokens, new = ids(2, 11), ids(2, 1, seed=1)
    mask = np.ones_like(tokens)
    mask[1, :5] = 0
    logits, past = graph.run(tokens, mask, graph.past(2))
    after, _ = graph.run(new, np.concatenate([mask, np.ones_like(new)], 1), past)
    for row in range(2):
        real = mask[row] == 1
        expected = truth(pair, np.concatenate([tokens[row][real], new[row]])[None])[0]
        assert_close(logits[row][real], expected[:-1])
        assert_close(after[row, 0], expected[-1])


@pytest.mark.parametrize("layout", ["dense", "uniform"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_layers_that_are_alike(layout: str, name: str, tmp_path: Path) -> None:
    source = open_source(make_dense(name, tmp_path / "dense", head_dim=16))
    checkpoint = source.path
    if layout == "uniform":
        whole = {"kv_heads": 1, "group_size": source.shape.group_size}
        layers = uniform_layers(source.shape, 3, **whole)
        layers = drop_experts(layers, source.shape, 3, alike=True)
        layers = narrow_experts(layers, source.shape, 3, alike=True)
        checkpoint = make_slim(source, "uniform", tmp_path / "slim", layers).slim
    graph, tokens = graph_of(checkpoint, tmp_path / "onnx", OnnxOptions()), ids(1, 9)
    with torch.no_grad():
        expected = load_exact(checkpoint)(torch.from_numpy(tokens), use_cache=False).logits.numpy()
    found, _ = graph.run(tokens, np.ones_like(tokens), graph.past(1))
    assert_close(found, expected)


@pytest.mark.parametrize("attention", ["gqa", "standard"])
def test_half_precision_stays_within_its_rounding(
    pairs: Any, attention: Attention, tmp_path: Path
) -> None:
    pair = pairs("mixtral")
    graph = graph_of(pair.slim, tmp_path / "onnx", OnnxOptions(attention, precision="fp16"))
    tokens = ids(1, 9)
    expected = truth(pair, tokens)
    half = load_slim(pair.slim, dtype=torch.float16)
    with torch.no_grad():
        same = half(torch.from_numpy(tokens), use_cache=False).logits.double().numpy()
    found, _ = graph.run(tokens, np.ones_like(tokens), graph.past(1))
    limit = 4 * np.abs(same - expected).max()
    limit += 4 * np.finfo(np.float16).eps * np.abs(expected).max()
    assert np.abs(found - expected).max() <= limit


@pytest.mark.parametrize("quant", ["int8", "int4", "int8-dynamic"])
def test_experts_are_not_quantised(pairs: Any, quant: Any, tmp_path: Path) -> None:
    options = OnnxOptions(quant=quant)
    with pytest.raises(ModelError, match=f"--quant {quant}: .* weights of experts"):
        write_onnx(pairs("mixtral").slim, tmp_path, options)
    assert not list(tmp_path.iterdir())

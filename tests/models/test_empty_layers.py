"""Layers that keep no attention, no MLP, or neither: what is left is the masked dense model, and
caches tell how far they are although the first layers may hold nothing."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import random_layers
from family_models import KNOWN, Pair, emptied, greedy, load, make_dense, make_slim, tokens
from old_transformers import FLOAT64, since_5
from transformers import DynamicCache, PreTrainedModel

from spp_export.common.errors import ModelError, PlanError
from spp_export.common.progress import quiet_transformers
from spp_export.evaluation.contract import exact_logits
from spp_export.models.checkpoint.checkpoint import Checkpoint, open_checkpoint, open_source
from spp_export.models.families import FAMILIES
from spp_export.slicing.config import slim_config

ABLE = [name for name in KNOWN if not FAMILIES[name].no_empty_layers("heads")]
# Of four layers, those without attention and those without an MLP: the first and the last, both at
# once, and what only one kind of layer keeps.
PLACES = {
    "ends": ((0, 3), (1, 3)),
    "middle": ((1, 2), (0, 2)),
    "first-two": ((0, 1), ()),
    "one-kind": ((0, 2), (3,)),
    "last-alone": ((0, 1, 2), (0, 1, 2)),
}
# In full for those that differ in what matters here: biases, norms, kinds of layers.
MANY = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "granite", "cohere2", "exaone4")


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Pair]:
    root = tmp_path_factory.mktemp("empty")

    @cache
    def dense(name: str) -> Checkpoint:
        return open_source(make_dense(name, root / name, layers=4))

    @cache
    def pair(name: str, places: str) -> Pair:
        source = dense(name)
        cut = not source.family.experts
        attention, mlp = PLACES[places]
        layers = random_layers(source.shape, 3, channels=cut)
        layers = emptied(layers, attention, mlp if cut else ())
        return make_slim(source, "per-layer", root / f"{name}-{places}", layers)

    return pair


CASES = [
    pytest.param(
        name,
        places,
        marks=[since_5(FLOAT64)] * (name == "ernie4_5_moe")
        + [pytest.mark.slow]
        * (places != "ends" and not (name in MANY[:5] and places in ("middle", "one-kind"))),
    )
    for name in ABLE
    for places in (PLACES if name in MANY else ("ends", "one-kind"))
]


@torch.no_grad()
def logits(model: PreTrainedModel, **options: Any) -> torch.Tensor:
    return model(tokens(), **options).logits


@pytest.mark.parametrize(("name", "places"), CASES)
def test_it_is_the_masked_dense_model(
    name: str, places: str, make: Callable[[str, str], Pair]
) -> None:
    """In float64, with a cache and without, of rows with padding before them."""
    pair = make(name, places)
    shape, opened = pair.source.shape, open_checkpoint(pair.slim)
    assert opened.layers == pair.plan.layer_shapes(shape)
    slim = load(pair.slim)
    stored = sum(torch.Size(tensor.shape).numel() for tensor in opened.tensors.values())
    assert shape.parameters(opened.layers) == stored
    with pair.masked() as masked:
        expected = exact_logits(masked)
        answer = greedy(masked, use_cache=False).tolist()
    assert (exact_logits(slim) - expected).abs().max().item() <= 1e-12
    assert greedy(slim).tolist() == answer
    assert greedy(slim, use_cache=False).tolist() == answer


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mistral"])
def test_every_cache_gives_the_same_tokens(
    name: str, places: str, make: Callable[[str, str], Pair]
) -> None:
    slim = load(make(name, places).slim)
    expected = greedy(slim, use_cache=False).tolist()
    assert greedy(slim, cache_implementation="static").tolist() == expected
    assert greedy(slim, past_key_values=DynamicCache()).tolist() == expected
    beams = {"num_beams": 3, "length_penalty": 0.0}
    uncached = greedy(slim, use_cache=False, **beams).tolist()
    assert greedy(slim, **beams).tolist() == uncached
    assert greedy(slim, cache_implementation="static", **beams).tolist() == uncached


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@pytest.mark.parametrize("places", PLACES)
def test_a_cache_holds_what_the_plan_says(
    name: str, places: str, make: Callable[[str, str], Pair]
) -> None:
    """As many elements per token; and it goes on from a copy, and from where it was cut."""
    pair = make(name, places)
    slim = load(pair.slim)
    ids = tokens()[:, :4]  # inside the window
    cached = DynamicCache(config=slim.config)
    with torch.no_grad():
        first = slim(ids, past_key_values=cached).past_key_values
        used = [layer for layer in first.layers if layer.is_initialized]
        held = sum(layer.keys.numel() + layer.values.numel() for layer in used)
        shape = pair.source.shape
        expected = shape.kv_bytes_per_token(pair.plan.layer_shapes(shape), 1) * ids.numel()
        # No layer of the first one's kind has attention: then that one counts.
        counted = name == "gemma3_text" and places in ("one-kind", "last-alone")
        assert held == expected + counted * 2 * ids.numel()
        assert first.get_seq_length() == 4
        again = slim(ids[:, :1], past_key_values=copy.deepcopy(first)).logits
        once_more = slim(ids[:, :1], past_key_values=first).logits
    torch.testing.assert_close(again, once_more, rtol=0, atol=0)


def test_saved_and_loaded_again_it_is_the_same(
    make: Callable[[str, str], Pair], tmp_path: Path
) -> None:
    pair = make("qwen2", "ends")
    slim = load(pair.slim)
    with quiet_transformers():
        slim.save_pretrained(tmp_path)
    assert open_checkpoint(tmp_path).layers == open_checkpoint(pair.slim).layers
    assert (logits(load(tmp_path)) - logits(slim)).abs().max().item() <= 1e-12


def test_gradients_pass_through(make: Callable[[str, str], Pair]) -> None:
    slim = load(make("granite", "ends").slim).train()
    old = slim.gradient_checkpointing_enable  # its name in transformers 4
    getattr(slim, "activation_checkpointing_enable", old)()
    slim(tokens(), labels=tokens()).loss.backward()
    assert all(parameter.grad is not None for parameter in slim.parameters())


def test_families_whose_attention_has_no_size_of_heads_refuse_by_name(tmp_path: Path) -> None:
    source = open_source(make_dense("gpt_neox", tmp_path / "dense", layers=4))
    layers = emptied(random_layers(source.shape, 3), (0, 3), ())
    with pytest.raises(PlanError, match="layer 0: the plan keeps no heads, and attention of gpt_n"):
        make_slim(source, "per-layer", tmp_path / "slim", layers)


def test_experts_keep_some_channels_where_attention_may_go() -> None:
    able = {name for name in ABLE if FAMILIES[name].experts}
    assert able
    for name in able:
        assert FAMILIES[name].no_empty_layers("both") == ""


def test_a_config_without_any_attention_is_refused(
    make: Callable[[str, str], Pair], tmp_path: Path
) -> None:
    pair = make("llama", "ends")
    nothing = [replace(pair.source.shape.layer, query_heads=0, kv_heads=0)] * 4
    config = slim_config(
        pair.source.config, pair.source.family, pair.source.shape, nothing, "per-layer"
    )
    shutil.copytree(pair.slim, tmp_path / "slim")
    (tmp_path / "slim" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no layer has attention heads"):
        open_checkpoint(tmp_path / "slim")

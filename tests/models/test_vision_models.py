"""Models that see: their decoder is sliced by its record, and their tower of vision not at all."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from old_transformers import OLD
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING
from vision_models import IMAGE, SEEING, make_seeing, picture

from spp_export.common.errors import ModelError
from spp_export.common.progress import quiet_transformers
from spp_export.evaluation.contract import (
    LIMIT,
    Pair,
    exact_logits,
    load_exact,
    make_slim,
    prove,
)
from spp_export.formats.settings import settings_of
from spp_export.models.checkpoint.checkpoint import Checkpoint, open_checkpoint, open_source
from spp_export.models.families import family_of
from spp_export.models.layerwise import open_layerwise

DERIVED = {"qwen2_5_vl"}  # a size of heads by which no uniform slice can be said


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """The dense model of a family, made once."""
    place = tmp_path_factory.mktemp("dense")
    return cache(lambda name: open_source(make_seeing(name, place / name / "dense")))


@pytest.fixture(scope="module", params=SEEING)
def pair(request: pytest.FixtureRequest, dense: Callable[[str], Checkpoint]) -> Pair:
    source = dense(request.param)
    return make_slim(source, "ragged", source.path.parent / "slim")


@torch.no_grad()
def test_a_slim_model_sees_what_the_masked_dense_one_sees(pair: Pair) -> None:
    name, slim = pair.source.shape.model_type, load_exact(pair.slim)
    length = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 5, "min_new_tokens": 5}
    length["suppress_tokens"] = [*range(IMAGE, IMAGE + 4)]  # parts of pictures that are not there
    with pair.masked() as masked:
        inputs = picture(name, masked)
        expected = exact_logits(masked, **inputs)
        unseen = {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}
        blank = exact_logits(masked, **unseen)
        follows = masked.generate(**inputs, **length).tolist()
    assert (exact_logits(slim, **inputs) - expected).abs().max().item() <= LIMIT
    assert (blank - expected).abs().max().item() > 1e-3
    assert slim.generate(**inputs, **length).tolist() == follows
    assert slim.generate(**inputs, **length, use_cache=False).tolist() == follows


@pytest.mark.parametrize("layout", [pytest.param("uniform"), "per-layer", "ragged"])
@pytest.mark.parametrize("name", SEEING)
@pytest.mark.slow
def test_text_alone_is_as_of_the_masked_dense_model(
    name: str, layout: str, dense: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    if layout == "uniform" and name in DERIVED:
        layout = "per-layer"
    prove(dense(name), layout, tmp_path / "slim")


def test_what_is_beside_the_decoder_stays_byte_for_byte(pair: Pair) -> None:
    before, after = (load_file(x / "model.safetensors") for x in (pair.source.path, pair.slim))
    assert after.keys() <= before.keys()  # experts go
    beside = {name for name, _ in pair.source.shape.beside}
    assert beside
    for name in beside:
        assert torch.equal(before[name], after[name]), name
    shape = pair.source.shape
    assert shape.parameters(shape.layers) == sum(tensor.numel() for tensor in before.values())
    opened = open_checkpoint(pair.slim)
    assert opened.shape.parameters(opened.layers) == sum(x.numel() for x in after.values())
    text = json.loads((pair.slim / "config.json").read_text())["text_config"]
    assert len(text["per_layer_config"]) == shape.num_layers
    assert not text["model_type"].startswith("spp_")


@torch.no_grad()
def test_attention_is_as_asked_for_and_can_be_switched(
    dense: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    pair = make_slim(dense("llava"), "per-layer", tmp_path / "slim")
    slim = load_exact(pair.slim, attn_implementation="eager")
    inputs, layers = picture("llava", slim), slim.model.language_model.layers
    asked = {layer.self_attn.config._attn_implementation for layer in layers}
    assert asked == {"eager"}
    before = slim(**inputs).logits
    slim.set_attn_implementation("sdpa")
    switched = {layer.self_attn.config._attn_implementation for layer in layers}
    assert switched == {"sdpa"}
    assert (slim(**inputs).logits - before).abs().max().item() < 1e-6  # eager's softmax is float32
    again = copy.deepcopy(slim)
    assert torch.equal(again(**inputs).logits, slim(**inputs).logits)


@pytest.mark.slow
@torch.no_grad()
def test_saved_and_loaded_again_it_is_the_same(pair: Pair, tmp_path: Path) -> None:
    slim = load_exact(pair.slim)
    with quiet_transformers():
        slim.save_pretrained(tmp_path)
    assert open_checkpoint(tmp_path).layers == open_checkpoint(pair.slim).layers
    again, inputs = load_exact(tmp_path), picture(pair.source.shape.model_type, slim)
    assert type(again) is type(slim)
    difference = exact_logits(again, **inputs) - exact_logits(slim, **inputs)
    assert difference.abs().max().item() <= LIMIT


def test_what_is_not_known_is_refused_by_name(dense: Callable[[str], Checkpoint]) -> None:
    source = dense("llava")
    with pytest.raises(
        ModelError, match="this format does not know a tower of vision, which llava"
    ):
        settings_of(source)
    with pytest.raises(ModelError, match="runs from disk does not know a tower of vision"):
        open_layerwise(source.path, torch.float32)


def test_a_decoder_that_no_record_tells_of_is_named(
    dense: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    config = json.loads((dense("llava").path / "config.json").read_text())
    config["text_config"]["model_type"] = "xlnet"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelError, match="text_config has the model_type 'xlnet', which is not sup"
    ):
        open_source(tmp_path)


@torch.no_grad()
def test_settings_of_the_decoder_may_stand_among_all_others(
    dense: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    """As Qwen2.5-VL was published, with rotary settings in the words of that time."""
    source = dense("qwen2_5_vl")
    config = json.loads((source.path / "config.json").read_text())
    settings = config.pop("text_config")
    settings.pop("model_type")
    sections = settings.pop("rope_scaling" if OLD else "rope_parameters")["mrope_section"]
    settings |= {"rope_scaling": {"type": "mrope", "mrope_section": sections}, "rope_theta": 1e4}
    shutil.copytree(source.path, tmp_path / "flat")
    (tmp_path / "flat" / "config.json").write_text(json.dumps({**config, **settings}))
    flat = open_source(tmp_path / "flat")
    assert flat.shape == source.shape
    pair = make_slim(flat, "ragged", tmp_path / "slim")
    written = json.loads((pair.slim / "config.json").read_text())
    assert "hidden_size" not in written
    assert written["text_config"]["rope_scaling"]["mrope_section"] == sections
    with pair.masked() as masked:
        inputs = picture("qwen2_5_vl", masked)
        expected = masked(**inputs).logits
    assert (load_exact(pair.slim)(**inputs).logits - expected).abs().max().item() <= LIMIT


@pytest.mark.parametrize(("name", "kind"), [("llava", "llama"), ("gemma3", "gemma3_text")])
def test_sizes_that_config_json_leaves_out_are_those_of_the_stock_class(
    name: str, kind: str
) -> None:
    """As LLaVA 1.5 and Gemma 3 were published."""
    config = {"model_type": name, "vision_config": {}, "text_config": {"model_type": kind}}
    shape, stock = family_of(config).read_shape(config, 2), CONFIG_MAPPING[kind]()
    assert (shape.num_layers, shape.hidden_size) == (stock.num_hidden_layers, stock.hidden_size)
    assert (shape.channels, shape.vocab_size) == (stock.intermediate_size, stock.vocab_size)
    heads = stock.num_attention_heads, stock.num_key_value_heads, stock.head_dim
    assert (shape.query_heads, shape.kv_heads, shape.head_dim) == heads

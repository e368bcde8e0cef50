"""Configs that claim anything at all, of every family and of slim checkpoints."""

from __future__ import annotations

import json

import pytest
import torch
from bounded import refused
from dense_models import CONFIGS, config_of, random_tensors, write_model
from factories import CASES, make_checkpoint, ragged_layers, random_layers, shape_of, write_slim

from spp_export.common.errors import CheckpointError, ModelError, SppError
from spp_export.formats.settings import rotary_tables, settings_of
from spp_export.models.checkpoint.checkpoint import open_checkpoint, open_source

pytestmark = pytest.mark.thinned

SIZES = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
)
# JSON texts that are no size of any model.
ABSURD = (
    *("-1", "0", "1000000000000", "9" * 4000, "1e3", "2.0", "true", '"8"', "[8]", "{}"),
    *("NaN", "Infinity", "1e999", '"' + "x" * 10**6 + '"', "[" + "1," * 10**5 + "1]"),
)


def message(opened, directory, error=ModelError):
    """What is said of it, in one line, soon."""
    with refused(error) as caught:
        opened(directory)
    return str(caught.value)


def write_config(directory, config, key, text):
    """The config with a raw JSON text under `key`."""
    content = json.dumps({k: v for k, v in config.items() if k != key})
    (directory / "config.json").write_text(f'{content[:-1]}, "{key}": {text}}}')


@pytest.fixture(scope="module", params=CONFIGS)
def family(request, tmp_path_factory):
    config = config_of(request.param)
    directory = tmp_path_factory.mktemp("family")
    return config, write_model(directory / "m", config, random_tensors(config))


@pytest.mark.parametrize("key", SIZES)
def test_absurd_sizes(family, key):
    config, directory = family
    for text in ABSURD:
        write_config(directory, config, key, text)
        assert "config" in message(open_source, directory)


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("factor", [2, 3, 1 / 2])
def test_sizes_of_another_model(family, key, factor):
    config, directory = family
    write_config(directory, config, key, str(int(config[key] * factor) or 7))
    message(open_source, directory)


@pytest.mark.parametrize("key", ["tie_word_embeddings", "attention_bias", "mlp_bias"])
@pytest.mark.parametrize("text", ["1", '"true"', "[]", "null and void"])
def test_switches(tmp_path, key, text):
    config = config_of("llama")
    write_model(tmp_path, config, random_tensors(config))
    write_config(tmp_path, config, key, text)
    assert "config" in message(open_source, tmp_path)


def test_a_config_twice_over(tmp_path):
    """transformers would take the second."""
    config = config_of("llama")
    write_model(tmp_path, config, random_tensors(config))
    content = json.dumps(config)
    (tmp_path / "config.json").write_text(f'{content[:-1]}, "hidden_size": 64}}')
    assert "'hidden_size' appears twice" in message(open_source, tmp_path)
    (tmp_path / "config.json").write_text(
        f'{content[:-1]}, "{"k" * 10**6}": 1, "{"k" * 10**6}": 1}}'
    )
    assert "appears twice" in message(open_source, tmp_path)


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "name",
    [
        "self_attn.sinks",
        "self_attn.q_proj.lora_A.weight",
        "self_attn.qkv_proj.weight",
        "self_attn.o_proj.weight_scale",
        "self_attn.rotary_emb.inv_freq.weight",
        "evil.self_attn.rotary_emb.inv_freq",
        "self_attn.k_proj.weight ",
        "SELF_ATTN.q_proj.weight",
    ],
)
def test_unknown_tensors_of_attention_are_named(tmp_path, case, name):
    config = config_of(case)
    full = f"model.layers.1.{name}"
    write_model(tmp_path, config, random_tensors(config) | {full: torch.ones(4)})
    said = message(open_source, tmp_path, CheckpointError)
    assert repr(full) in said
    assert "unknown to the" in said


@pytest.fixture(scope="module")
def slims(tmp_path_factory):
    """Per-layer and ragged checkpoints with their configs."""
    root = tmp_path_factory.mktemp("slims")
    dense = make_checkpoint(root, "llama", kv_heads=4, query_heads=8)
    shape = shape_of(dense)
    regular = write_slim(root / "regular", dense, random_layers(shape, 1))
    ragged = write_slim(root / "ragged", dense, ragged_layers(shape, 1), "ragged")
    return {
        path.name: (path, json.loads((path / "config.json").read_text()))
        for path in (regular, ragged)
    }


def test_slim_checkpoints_open(slims):
    assert open_checkpoint(slims["regular"][0]).layout == "per-layer"
    assert open_checkpoint(slims["ragged"][0]).layout == "ragged"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_familys_layers_are_those_that_were_written(tmp_path, case):
    dense = case.make(tmp_path)
    shape = shape_of(dense)
    layers = random_layers(shape, 2)
    slim = write_slim(tmp_path / "slim", dense, layers)
    found = open_checkpoint(slim)
    assert found.layers == tuple(layer.shape(shape) for layer in layers)
    assert found.family.model_type == case.family
    whole = open_checkpoint(dense)
    assert (whole.layout, whole.layers) == ("uniform", shape.layers)


def layer(**changes):
    def change(config):
        first = next(iter(config["per_layer_config"].values()))
        first.update(changes)

    return change


def listed(change):
    return lambda config: config.update(per_layer_config=change(config["per_layer_config"]))


EDITS = {
    "no list": listed(lambda _: None),
    "a list": listed(lambda found: list(found.values())),
    "a word": listed(lambda _: "x" * 10**6),
    "a layer less": listed(lambda found: dict(list(found.items())[1:])),
    "a layer more": listed(lambda found: {**found, "3": found["0"]}),
    "a layer twice": listed(lambda found: {"00": found["0"], "0": found["0"], "1": found["1"]}),
    "a layer below": listed(lambda found: {**dict(list(found.items())[1:]), "-1": found["0"]}),
    "a layer beyond": listed(
        lambda found: {**dict(list(found.items())[1:]), "9" * 300: found["0"]}
    ),
    "no number": listed(lambda found: {**dict(list(found.items())[1:]), "x": found["0"]}),
    "a layer that is a list": listed(lambda found: {**found, "0": [1]}),
    "no heads": layer(num_attention_heads=0),
    "heads below": layer(num_attention_heads=-4),
    "half heads": layer(num_attention_heads=2.0),
    "true heads": layer(num_attention_heads=True),
    "heads in words": layer(num_attention_heads="4"),
    "heads without end": layer(num_attention_heads=10**12, num_key_value_heads=10**12),
    "uneven heads": layer(num_attention_heads=5, num_key_value_heads=2),
    "channels without end": layer(intermediate_size=10**12),
    "groups of nothing": layer(query_groups=[0] * 4),
    "groups of lists": layer(query_groups=[[1]]),
    "groups that are a number": layer(query_groups=4),
    "groups of other heads": layer(query_groups=[1] * 1000),
    "layers without end": lambda config: config.update(num_hidden_layers=10**12),
    "more layers": lambda config: config.update(num_hidden_layers=4096),
    "biases of anything": lambda config: config.update(biased_projections=["self_attn.q_proj"]),
    "biases that are a number": lambda config: config.update(biased_projections=7),
    "biases that are a word": lambda config: config.update(biased_projections="self_attn.o_proj"),
    "biases that are not there": lambda config: config.update(
        biased_projections=["self_attn.o_proj"]
    ),
    "another family": lambda config: config.update(model_type="spp_gpt2"),
    "no family": lambda config: config.update(model_type=["spp_llama"]),
    "quantised": lambda config: config.update(quantization_config={"bits": 4}),
}


def settings_of_directory(directory):
    return settings_of(open_checkpoint(directory))


@pytest.mark.parametrize("kind", EDITS)
@pytest.mark.parametrize("slim", ["regular", "ragged"])
@pytest.mark.parametrize(
    "opened", [open_checkpoint, settings_of_directory], ids=lambda f: f.__name__
)
def test_edited_layers(slims, kind, slim, opened):
    directory, config = slims[slim]
    changed = json.loads(json.dumps(config))
    EDITS[kind](changed)
    path = directory / "config.json"
    original = path.read_bytes()
    path.write_text(json.dumps(changed))
    try:
        message(opened, directory)
    finally:
        path.write_bytes(original)


POSITIONS = {
    "without end": {"max_position_embeddings": 10**12},
    "none": {"max_position_embeddings": 0},
    "in words": {"max_position_embeddings": "many"},
    "below": {"max_position_embeddings": -1},
    "epsilon in words": {"rms_norm_eps": "small"},
    "epsilon below": {"rms_norm_eps": -1.0},
    "activation": {"hidden_act": ["x" * 10**6]},
    "theta in words": {"rope_theta": "x"},
    "another rotation": {"rope_scaling": {"rope_type": "x" * 10**6}},
}


@pytest.mark.parametrize("kind", POSITIONS)
def test_settings_that_a_graph_would_turn_into_tables(tmp_path, kind):
    config = config_of("llama")
    write_model(tmp_path, config | POSITIONS[kind], random_tensors(config))

    def tables(directory):
        decoder = open_checkpoint(directory)
        rotary_tables(settings_of(decoder), decoder.family, decoder.shape.head_dim)

    message(tables, tmp_path, SppError)

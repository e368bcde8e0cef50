"""The files beside model.onnx: what other readers of them rely on."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, AutoConfig

from spp_export.formats.onnx import OnnxOptions
from spp_export.formats.onnx.companions import genai_config, onnx_config, tokenizer_config
from spp_export.models.families import FAMILIES
from spp_export.models.shape import LayerShape, ModelShape
from spp_export.slicing.config import slim_config

LAYERS = (LayerShape(8, 4, 96), LayerShape(3, 3, 40), LayerShape(2, 1, 64))
OPTIONS = OnnxOptions()

# Those that a graph of ours can compute.
KNOWN = [
    name for name, family in FAMILIES.items() if not family.features and name in CONFIG_MAPPING
]


def dense_config(family: str, **changes: Any) -> dict[str, Any]:
    """The head size is that of hidden_size over heads, as in most models."""
    sizes = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
    stock = AutoConfig.for_model(family, vocab_size=263, **sizes, **heads)
    return json.loads(stock.to_json_string(use_diff=False)) | changes


def made(
    family: str,
    layout: str,
    layers: tuple[LayerShape, ...] = LAYERS,
    options: OnnxOptions = OPTIONS,
    **changes: Any,
) -> dict[str, Any]:
    """config.json of the graph of a slim checkpoint, through the checkpoint's own config.json."""
    record, source = FAMILIES[family], dense_config(family, **changes)
    slim = slim_config(source, record, shape_of(family, source), layers, layout)
    return onnx_config(slim, record, shape_of(family, slim), layers, layout, options, 512)


def shape_of(family: str, config: dict[str, Any]) -> ModelShape:
    return FAMILIES[family].read_shape(config, element_bytes=4)


@pytest.mark.parametrize("family", KNOWN)
def test_a_per_layer_config_is_stock_and_lists_the_layers(family):
    config = made(family, "per-layer")
    assert config["model_type"] == family
    assert config["architectures"] == [FAMILIES[family].architecture]
    assert not config.keys() & {"auto_map", "per_layer_config", "base_architecture"}
    assert "serialize_explicit_per_layer_config" not in config
    assert config["num_attention_heads_per_layer"] == [8, 3, 2]
    assert config["num_key_value_heads_per_layer"] == [4, 3, 1]
    assert config["intermediate_size_per_layer"] == [96, 40, 64]
    counts = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    assert [config[name] for name in counts] == [8, 4, 96]
    assert list(config) == sorted(config)
    assert type(AutoConfig.for_model(**config)).model_type == family


def test_a_config_of_experts_lists_how_many_and_how_wide():
    """In the place of widths of MLPs, which there are none of."""
    layers = tuple(
        LayerShape(8, 4, 96, dropped_experts=one, dropped_channels=other)
        for one, other in ((0, 0), (3, 40), (5, 0))
    )
    config = made("mixtral", "per-layer", layers)
    assert config["num_experts_per_layer"] == [8, 5, 3]
    assert config["expert_size_per_layer"] == [96, 56, 96]
    assert "intermediate_size_per_layer" not in config
    assert config["num_local_experts"] == 8


@pytest.mark.parametrize("family", KNOWN)
def test_a_uniform_config_has_the_layers_kv_heads_and_a_divisor_of_hidden_size(family):
    config = made(family, "uniform", (LayerShape(4, 2, 40),) * 3)
    assert config["num_key_value_heads"] == 2
    assert config["intermediate_size"] == 40
    assert config["hidden_size"] // config["num_attention_heads"] == config["head_dim"] == 16
    assert config["num_attention_heads_per_layer"] == [4, 4, 4]
    AutoConfig.for_model(**config)


def test_heads_that_no_divisor_replaces_stay():
    """A hidden size that is not a multiple of the head size."""
    config = made("qwen3", "uniform", (LayerShape(4, 2, 40),) * 3, hidden_size=120)
    assert config["num_attention_heads"] == 4


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")]
)
def test_the_form_of_the_graph_is_recorded(precision, dtype):
    options = OnnxOptions("standard", precision, "int8")
    config = made("llama", "per-layer", options=options)
    assert config["dtype"] == config["torch_dtype"] == dtype
    assert config["transformers.js_config"] == {"dtype": "fp32", "use_external_data_format": True}
    form = {"attention": "standard", "precision": precision, "quant": "int8"}
    assert config["spp_onnx"] == {**form, "layout": "per-layer", "version": 1}


@pytest.mark.parametrize(
    ("attention", "positions", "shared"),
    [("gqa", False, True), ("gqa-bias", True, True), ("standard", True, False)],
)
def test_genai_is_told_the_inputs_and_whether_the_cache_is_shared(attention, positions, shared):
    options = OnnxOptions(attention)
    config = made("mistral", "per-layer", options=options, sliding_window=6)
    genai = genai_config(config, {}, LAYERS, 16, options, [2], "llama")
    decoder = genai["model"]["decoder"]
    assert ("position_ids" in decoder["inputs"]) == positions
    assert genai["search"]["past_present_share_buffer"] is shared
    assert "sliding_window" not in decoder
    counts = ("num_attention_heads", "num_key_value_heads", "num_hidden_layers", "head_size")
    assert [decoder[name] for name in counts] == [8, 4, 3, 16]
    assert genai["model"]["type"] == "llama"
    assert genai["model"]["context_length"] == genai["search"]["max_length"] == 512


@pytest.mark.parametrize(
    ("generation", "stop", "eos", "pad"),
    [
        ({}, (2,), 2, 2),
        ({}, (7, 2), [7, 2], 7),
        ({"pad_token_id": 0}, (7,), 7, 0),
    ],
)
def test_genai_stops_where_it_is_told_to(generation, stop, eos, pad):
    config = made("llama", "per-layer", eos_token_id=5, bos_token_id=None, pad_token_id=None)
    model = genai_config(config, generation, LAYERS, 16, OPTIONS, stop, "llama")["model"]
    assert (model["eos_token_id"], model["pad_token_id"]) == (eos, pad)
    assert "bos_token_id" not in model


def test_sampling_settings_of_the_model_are_kept():
    generation = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": None}
    config = made("qwen3", "per-layer")
    search = genai_config(config, generation, LAYERS, 16, OPTIONS, [2], "llama")["search"]
    names = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
    assert [search[name] for name in names] == [True, 0.6, 20, 1.0, 1.0]


def test_a_tokenizer_that_transformers_4_knows():
    source = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>", "<b>"]}
    config = tokenizer_config(source | {"additional_special_tokens": ["<b>"]}, OPTIONS)
    assert config == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<b>", "<a>"],
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "right",
    }


@pytest.mark.parametrize("attention", ["gqa-bias", "standard"])
def test_a_tokenizer_pads_as_before_where_the_graph_takes_it(attention):
    source = {"tokenizer_class": "LlamaTokenizerFast", "padding_side": "left"}
    assert tokenizer_config(source, OnnxOptions(attention)) == source

"""The plugin for vLLM, with as much of vLLM as it touches; the rest is checked in its source."""

from __future__ import annotations

import importlib
import sys
import types
from importlib.metadata import entry_points

import pytest
from factories import CASES, random_layers, shape_of, write_slim
from transformers import AutoConfig

import spp_export.models.modeling  # noqa: F401
from spp_export.models.families import FAMILIES
from spp_export.models.vllm import register


class Layer:
    """A decoder layer that only keeps its config."""

    def __init__(self, vllm_config=None, prefix="", config=None):
        self.config = config


class Qwen3Layer:
    def __init__(self, config, cache_config=None, quant_config=None, prefix=""):
        self.config = config


class Decoder:
    """Builds as many layers as the config says, the way vLLM's Llama does."""

    def __init__(self, *, vllm_config, prefix="", layer_type=Layer):
        config = vllm_config.model_config.hf_config
        self.layers = [
            layer_type(vllm_config=vllm_config, prefix=f"{prefix}.layers.{index}")
            for index in range(config.num_hidden_layers)
        ]


class Qwen3Decoder:
    decoder_layer_type = Qwen3Layer
    hf_to_vllm_mapper = "of Qwen3"

    def __init__(self, *, vllm_config, prefix=""):
        config = vllm_config.model_config.hf_config
        self.layers = [
            self.decoder_layer_type(config, None, None, prefix=f"{prefix}.layers.{index}")
            for index in range(config.num_hidden_layers)
        ]


class Causal:
    hf_to_vllm_mapper = "of Llama"

    def __init__(self, *, vllm_config, prefix=""):
        self.model = self._init_model(vllm_config=vllm_config, prefix="model", layer_type=Layer)

    def _init_model(self, vllm_config, prefix="", layer_type=Layer):
        return Decoder(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)


@pytest.fixture
def vllm(monkeypatch):
    """Modules by vLLM's names; what was registered."""
    registered = {}
    models = "vllm.model_executor.models"
    content = {
        "vllm": {
            "ModelRegistry": types.SimpleNamespace(register_model=registered.__setitem__),
        },
        "vllm.config": {"VllmConfig": object},
        "vllm.model_executor": {},
        models: {},
        f"{models}.llama": {
            "LlamaDecoderLayer": Layer,
            "LlamaForCausalLM": Causal,
        },
        f"{models}.mistral": {
            "MistralDecoderLayer": type("MistralLayer", (Layer,), {}),
            "MistralForCausalLM": type("MistralCausal", (Causal,), {}),
        },
        f"{models}.qwen3": {"Qwen3DecoderLayer": Qwen3Layer, "Qwen3Model": Qwen3Decoder},
        f"{models}.utils": {
            "extract_layer_index": lambda prefix: int(prefix.rpartition(".")[2]),
        },
    }
    for name, attributes in content.items():
        module = types.ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "spp_export.models.vllm.models", raising=False)
    yield registered
    sys.modules.pop("spp_export.models.vllm.models", None)


def built(registered, config):
    """The model that vLLM would build for a config, of the classes that were registered."""
    module, name = registered[config.architectures[0]].split(":")
    kind = getattr(importlib.import_module(module), name)
    given = types.SimpleNamespace(model_config=types.SimpleNamespace(hf_config=config))
    return kind(vllm_config=given)


def test_vllm_finds_the_plugin():
    found = list(entry_points(group="vllm.general_plugins"))
    assert [point.load() for point in found if point.name == "spp_export"] == [register]


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name != "qwen3-mqa-bias"], ids=lambda case: case.name
)
def test_every_layer_gets_its_own_sizes(case, tmp_path, vllm):
    dense = case.make(tmp_path)
    layers = random_layers(shape_of(dense), 3)
    slim = write_slim(tmp_path / "slim", dense, layers)
    config = AutoConfig.from_pretrained(slim)
    register()
    assert set(vllm) == {f"Spp{FAMILIES[case.family].architecture}" for case in CASES}
    model = built(vllm, config)
    shapes = [layer.shape(shape_of(dense)) for layer in layers]
    found = [
        (each.config.num_attention_heads, each.config.num_key_value_heads)
        for each in model.model.layers
    ]
    assert found == [(shape.query_heads, shape.kv_heads) for shape in shapes]
    widths = [layer.config.intermediate_size for layer in model.model.layers]
    assert widths == [shape.channels for shape in shapes]
    family = config.model_type
    one = model.model.layers[0].config
    assert one.head_dim == config.head_dim
    assert getattr(one, "qkv_bias", False) == (family == "qwen2")
    assert model.hf_to_vllm_mapper == ("of Qwen3" if family == "qwen3" else "of Llama")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_config_says_what_the_transformers_backend_reads(case, tmp_path):
    """As vLLM's convertor does: per_layer_config of a config that is_heterogeneous."""
    dense = case.make(tmp_path)
    layers = random_layers(shape_of(dense), 3)
    config = AutoConfig.from_pretrained(write_slim(tmp_path / "slim", dense, layers))
    if not hasattr(config, "is_heterogeneous"):
        pytest.skip("transformers before 5.14 has no such config, nor has vLLM then")
    assert config.is_heterogeneous
    assert "AutoModel" in config.auto_map
    assert len(config.per_layer_config) == len(layers)
    for index, layer in enumerate(layers):
        shape, found = layer.shape(shape_of(dense)), config.per_layer_config[index]
        assert found.num_attention_heads == shape.query_heads
        assert found.num_key_value_heads == shape.kv_heads
        assert found.intermediate_size == shape.channels
        assert found.head_dim == shape_of(dense).head_dim


def test_biases_of_o_proj_are_given_and_others_refused(tmp_path, vllm):
    dense = CASES[0].make(tmp_path)
    slim = write_slim(tmp_path / "slim", dense, random_layers(shape_of(dense), 3))
    config = AutoConfig.from_pretrained(slim)
    register()
    config.biased_projections = ["self_attn.o_proj"]
    one = built(vllm, config).model.layers[0].config
    assert (one.attention_bias, one.qkv_bias) == (True, False)
    config.biased_projections = ["mlp.down_proj"]
    with pytest.raises(ValueError, match=r"no bias on mlp\.down_proj alone.*--model-impl transf"):
        built(vllm, config)


def test_biases_that_vllm_would_leave_out_are_refused(tmp_path, vllm):
    (case,) = (case for case in CASES if case.name == "qwen3-mqa-bias")
    dense = case.make(tmp_path)
    slim = write_slim(tmp_path / "slim", dense, random_layers(shape_of(dense), 3))
    register()
    with pytest.raises(ValueError, match=r"Qwen3 layers have no bias on o_proj\. Run it with"):
        built(vllm, AutoConfig.from_pretrained(slim))


def test_uneven_groups_are_refused(tmp_path, vllm):
    models = importlib.import_module("spp_export.models.vllm.models")
    layer = types.SimpleNamespace(query_groups=[3, 1])
    config = types.SimpleNamespace(layer_config=lambda index: layer)
    with pytest.raises(ValueError, match="layer 4: its KV heads serve different numbers"):
        models.layer_config(config, "model.layers.4")


@pytest.mark.parametrize(
    ("counts", "what"), [((0, 8), "attention"), ((2, 0), "MLP")], ids=["attention", "mlp"]
)
def test_layers_that_lack_a_part_are_refused(vllm, counts, what):
    models = importlib.import_module("spp_export.models.vllm.models")
    heads, channels = counts
    layer = types.SimpleNamespace(num_attention_heads=heads, intermediate_size=channels)
    config = types.SimpleNamespace(layer_config=lambda index: layer)
    with pytest.raises(ValueError, match=f"layer 4 has no {what}, .* --no-allow-empty-layers"):
        models.layer_config(config, "model.layers.4")

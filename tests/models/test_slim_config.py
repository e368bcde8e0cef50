"""config.json of slim checkpoints: what it says, and that transformers reads it as the source's."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module

import pytest
from factories import CASES, read_config, shape_of
from transformers import AutoConfig

import spp_export.models.modeling  # noqa: F401  registers the per-layer configs
from spp_export.common.errors import ModelError, PlanError
from spp_export.models.families import FAMILIES, Role
from spp_export.models.shape import LayerShape
from spp_export.slicing.config import MODELING_FILES, portable_config, slim_config

LLAMA = FAMILIES["llama"]
SOURCE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_hidden_layers": 12,
    "num_key_value_heads": 4,
    "vocab_size": 263,
}
SHAPE = LLAMA.read_shape(SOURCE, element_bytes=4)
LAYERS = (LayerShape(6, 2, 80), *[LayerShape(3, 3, 96)] * 11)
ALIKE = (LayerShape(4, 2, 80),) * 12


def slim(source=SOURCE, layers=LAYERS, layout="per-layer", family=LLAMA, **options):
    heads = [range(layer.query_heads) for layer in layers]
    return slim_config(source, family, SHAPE, layers, layout, kept_heads=heads, **options)


def test_per_layer_lists_every_layer_and_keeps_the_global_counts():
    config = slim()
    assert list(config["per_layer_config"]) == [f"{index:02d}" for index in range(12)]
    assert config["per_layer_config"]["00"] == {
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 80,
    }
    assert config["serialize_explicit_per_layer_config"] is True
    assert config["num_attention_heads_per_layer"] == [6] + [3] * 11
    assert config["num_key_value_heads_per_layer"] == [2] + [3] * 11
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (8, 4)
    assert (config["intermediate_size"], config["head_dim"]) == (96, 8)


def test_per_layer_names_our_classes():
    config = slim()
    assert config["model_type"] == "spp_llama"
    assert config["architectures"] == ["SppLlamaForCausalLM"]
    assert config["base_architecture"] == "LlamaForCausalLM"
    files = {path.stem: path for path in MODELING_FILES}
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    for reference in config["auto_map"].values():
        module, name = reference.split(".")
        own = import_module(f"spp_export.models.modeling.{files[module].stem}")
        assert getattr(own, name).__qualname__ == name


def test_uniform_is_a_stock_config():
    config = slim(layers=ALIKE, layout="uniform")
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, 2)
    assert (config["intermediate_size"], config["head_dim"]) == (80, 8)
    assert not {"per_layer_config", "auto_map", "base_architecture"} & set(config)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_transformers_reads_everything_else_as_in_the_source(case, tmp_path):
    dense = case.make(tmp_path)
    source, shape = read_config(dense), shape_of(dense)
    family = FAMILIES[shape.model_type]
    config = slim_config(source, family, shape, shape.layers, "per-layer")
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = AutoConfig.from_pretrained(tmp_path).to_dict()
    ours = {"model_type", "architectures", "auto_map", "base_architecture", "per_layer_config"}
    ours |= {"serialize_explicit_per_layer_config", "num_attention_heads_per_layer"}
    ours |= {"num_key_value_heads_per_layer", "transformers_version", "_name_or_path"}
    for key, value in AutoConfig.from_pretrained(dense).to_dict().items():
        if key not in ours:
            assert read[key] == value, key


OLD_AND_NEW = {
    "default": (
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ),
    "absent": ({}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    "linear": (
        {"rope_theta": 100.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}},
    ),
    "yarn": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_theta": 1e6},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}},
    ),
}


@pytest.mark.parametrize("kind", OLD_AND_NEW)
def test_both_ways_to_write_rotary_settings_give_both(kind):
    old, new = OLD_AND_NEW[kind]
    configs = [portable_config({**SOURCE, **form}) for form in (old, new)]
    assert configs[0] == configs[1]
    parameters = configs[0]["rope_parameters"]
    assert parameters == new["rope_parameters"]
    assert configs[0]["rope_theta"] == parameters["rope_theta"]
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    expected = None if kind in ("default", "absent") else scaling
    assert configs[0]["rope_scaling"] == expected
    assert portable_config(configs[0]) == configs[0]


# Those that transformers 4 has, which has no sizes of single layers.
OF_OLD = [name for name, x in FAMILIES.items() if x.rope_by_type and not x.by_layer]


@pytest.mark.parametrize("name", OF_OLD)
@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 8.0}])
@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
def test_rotary_settings_by_layer_type_may_be_of_an_old_version(name, scaling, layout):
    """As Gemma 3 and OLMo 3 were published."""
    old = {"rope_theta": 1e6, "rope_local_base_freq": 500.0, "rope_scaling": scaling}
    source = {**SOURCE, **old, "model_type": name}
    source |= {"layer_types": ["full_attention", "sliding_attention"] * 6, "head_dim": 8}
    made = slim(source, ALIKE, layout, FAMILIES[name])
    read, dense = AutoConfig.for_model(**made), AutoConfig.for_model(**source)
    for key in ("rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq"):
        assert getattr(read, key, None) == getattr(dense, key, None), key


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_type_is_given_under_both_names(key):
    config = portable_config({**SOURCE, key: "bfloat16"})
    assert (config["dtype"], config["torch_dtype"]) == ("bfloat16", "bfloat16")
    assert "dtype" not in portable_config(SOURCE)


def test_origin_and_foreign_code_are_left_out():
    config = slim({**SOURCE, "_name_or_path": "/home/me/x", "auto_map": {"AutoModel": "evil.X"}})
    assert "_name_or_path" not in config
    assert "evil" not in json.dumps(config)


def test_equal_arguments_give_equal_json():
    shuffled = dict(reversed(SOURCE.items()))
    assert json.dumps(slim()) == json.dumps(slim(shuffled))
    assert list(slim()) == sorted(slim())


SWITCHES = {"attention_bias", "mlp_bias", "biased_projections"}


def test_per_layer_names_the_projections_that_compensation_gives_a_bias():
    for family in FAMILIES.values():
        if family.experts:  # MLPs lose nothing
            continue
        config = slim(family=family, biased={Role.DOWN, Role.OUTPUT})
        assert config["biased_projections"] == [family.down, family.output]
        assert SWITCHES & config.keys() == {"biased_projections"}
        only = slim(family=family, biased={Role.OUTPUT})
        assert only["biased_projections"] == [family.output]
    assert not SWITCHES & slim().keys()


def test_a_bias_that_the_source_has_is_not_named():
    source = {**SOURCE, "attention_bias": True}
    shape = LLAMA.read_shape(source, element_bytes=4)
    biased = {Role.DOWN, Role.OUTPUT}
    config = slim_config(source, LLAMA, shape, LAYERS, "per-layer", biased)
    assert config["biased_projections"] == ["mlp.down_proj"]
    config = slim_config(source, LLAMA, shape, LAYERS, "per-layer", {Role.OUTPUT})
    assert "biased_projections" not in config


@pytest.mark.parametrize(
    ("family", "role", "switch"),
    [
        ("llama", Role.OUTPUT, "attention_bias"),
        ("llama", Role.DOWN, "mlp_bias"),
        ("qwen3", Role.OUTPUT, "attention_bias"),
        ("qwen3", Role.DOWN, None),
        ("mistral", Role.OUTPUT, None),
        ("qwen2", Role.DOWN, None),
    ],
)
def test_uniform_has_the_biases_that_the_stock_config_can_switch_on(family, role, switch):
    asked = {"layers": ALIKE, "layout": "uniform", "family": FAMILIES[family], "biased": [role]}
    if switch is None:
        with pytest.raises(PlanError, match=f"{family} family has no bias on its {role} proj"):
            slim(**asked)
        return
    config = slim(**asked)
    assert config[switch] is True
    assert SWITCHES & config.keys() == {switch}


@pytest.mark.parametrize(
    ("layers", "layout", "message"),
    [
        (ALIKE[:5], "uniform", "the plan has 5 layers and the model 12"),
        ((*LAYERS[:11], LayerShape(5, 2, 96)), "per-layer", "layer 11: 5 query heads over 2"),
        ((*LAYERS[:11], LayerShape(2, 0, 96)), "per-layer", "layer 11: 2 query heads over 0"),
        (LAYERS, "uniform", "layer 1 has .3 query, 3 KV, 96 channels., the first has"),
        ((LayerShape(6, 2, 96),) * 12, "uniform", "divides hidden_size 64, the plan keeps 6"),
        ((*LAYERS[:11], LayerShape(4, 2, 96, (3, 1))), "per-layer", "4 query heads over 2 KV"),
        ((*LAYERS[:11], LayerShape(5, 2, 96)), "ragged", "layer 11: 5 query heads over 2"),
        (ALIKE, "square", "layout 'square' has no config"),
    ],
)
def test_what_a_layout_cannot_express_is_an_error(layers, layout, message):
    with pytest.raises(PlanError, match=message):
        slim(layers=layers, layout=layout)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}},
            "rope_theta is 2.0 in rope_parameters and 1.0 in",
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "per layer type"),
        ({"rope_scaling": "linear"}, "must be null or one flat object, got 'linear'"),
    ],
)
def test_rotary_settings_that_contradict_are_an_error(changes, message):
    with pytest.raises(ModelError, match=message):
        slim({**SOURCE, **changes})


def test_needs_neither_torch_nor_transformers():
    code = (
        "import sys, spp_export.slicing.config; print({'torch', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "set()\n", result.stderr

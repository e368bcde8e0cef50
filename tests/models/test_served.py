"""Which engines run a family, and what is said of that."""

from __future__ import annotations

import json

import pytest
from family_models import make_dense, make_slim
from old_transformers import ABSENT, since_5

from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.models.engines import engines_for
from spp_export.models.families import FAMILIES
from spp_export.models.families.served import BACKEND, GENAI, NOT_BACKEND, PLUGIN, SGLANG, VLLM
from spp_export.models.shape import LayerShape

LAYERS = (LayerShape(8, 4, 96), LayerShape(4, 2, 48))


def test_only_families_are_named():
    assert FAMILIES.keys() >= BACKEND | GENAI | NOT_BACKEND | PLUGIN | SGLANG | VLLM
    assert not BACKEND & NOT_BACKEND
    assert PLUGIN <= BACKEND


@pytest.mark.parametrize(
    ("model_type", "layout", "loads", "how"),
    [
        ("llama", "uniform", "yes", "0.29 or newer, no code; 1, 2, 4 cards"),
        ("llama", "per-layer", "yes", "with spp-export installed, or --trust-remote-code"),
        ("llama", "ragged", "no", "write it with --pad"),
        ("qwen2", "uniform", "yes", "--model-impl transformers"),
        ("gemma2", "per-layer", "yes", "--trust-remote-code"),
        ("gpt2", "uniform", "yes", "no code"),
        ("gpt2", "per-layer", "no", "does not run this family"),
        ("other", "per-layer", "no", "nothing is known"),
    ],
)
def test_what_is_said_of_vllm(model_type, layout, loads, how):
    engine = {one.name: one for one in engines_for(model_type, layout, LAYERS)}["vLLM"]
    assert engine.loads == loads
    assert how in engine.how


def test_vllm_makes_the_experts_of_all_layers_alike():
    layers = (LayerShape(8, 4, 0), LayerShape(8, 4, 0, dropped_experts=1))
    engine = {one.name: one for one in engines_for("mixtral", "per-layer", layers)}["vLLM"]
    assert (engine.loads, "one number of experts" in engine.how) == ("no", True)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("granite", "logit_scale", 1 / 3),
        ("granitemoe", "logit_scale", 1 / 3),
        pytest.param("hyperclovax", "logit_scale", 3.0, marks=since_5(ABSENT)),
        ("opt", "hidden_size_per_head", 8),
        ("gpt_bigcode", "hidden_size_per_head", 8),
        ("llama", "hidden_size_per_head", None),
    ],
)
def test_the_config_says_what_vllm_would_read_elsewhere(name, key, value, tmp_path):
    source = open_source(make_dense(name, tmp_path / "dense"))
    for layout in ("per-layer", "uniform"):
        if layout == "uniform" and source.family.derived_head_dim:
            continue
        slim = make_slim(source, layout, tmp_path / layout)
        config = json.loads((slim.slim / "config.json").read_text())
        assert config.get(key) == (value if layout == "per-layer" else None)

"""Which engines run a family, and what is said of that."""

from __future__ import annotations

import pytest

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
    assert (engine.loads, "experts of the dense model" in engine.how) == ("no", True)

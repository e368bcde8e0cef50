"""What every family must do: sliced by its record alone, a model computes what the dense one does
with the removed units masked, in float64, whatever it computes otherwise than Llama."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers
from family_models import (
    EXPERTS,
    FORMS,
    KNOWN,
    Pair,
    family_name,
    greedy,
    layouts,
    load,
    make_dense,
    make_slim,
    padded,
    tokens,
)
from old_transformers import FLOAT64, but_in_old, since_5
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

from spp_export.common.progress import quiet_transformers
from spp_export.evaluation.contract import exact_logits
from spp_export.models.checkpoint.checkpoint import Checkpoint, open_checkpoint, open_source
from spp_export.models.families import FAMILIES, Feature

NAMES = [*KNOWN, *(name for name, (family, _) in FORMS.items() if family in KNOWN)]


# What stock models of transformers 4 do not do of it.
UNABLE = {
    "opt-bare": [since_5("it makes no norms without weights")],
    "mpt": [since_5(FLOAT64)],
    "ernie4_5_moe": [since_5(FLOAT64)],
    "falcon_h1": [since_5("its masks are not as long as its caches")],
}
# The first layout of every family and every form of one, and slowly the others.
CASES = [
    pytest.param(
        (name, layout),
        marks=[*UNABLE.get(name, ()), *([pytest.mark.slow] if number else ())],
        id=f"{name}-{layout}",
    )
    for name in NAMES
    for number, layout in enumerate(layouts(FAMILIES[family_name(name)]))
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """The dense model of a family, made once."""
    place = tmp_path_factory.mktemp("dense")

    @cache
    def made(name: str) -> Checkpoint:
        return open_source(make_dense(name, place / name / "dense"))

    return made


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, dense: Callable[[str], Checkpoint]) -> Pair:
    name, layout = request.param
    source = dense(name)
    return make_slim(source, layout, source.path.parent / layout)


def test_a_slim_model_is_the_masked_dense_model(pair: Pair) -> None:
    assert pair.as_planned()
    slim = load(pair.slim)
    with pair.masked() as masked:
        expected = exact_logits(masked)
    assert (exact_logits(slim) - expected).abs().max().item() <= 1e-12
    assert expected.std().item() > 0.01


def test_generation_is_that_of_the_masked_dense_model(pair: Pair) -> None:
    """With a cache and without, of rows with padding before them."""
    with pair.masked() as masked:
        assert bool(exact_logits(masked, **padded(masked)).isfinite().all())
        expected = greedy(masked, use_cache=False).tolist()
        cached = greedy(masked, use_cache=True).tolist()
    # Rows with padding are others with a cache in transformers' own MiniMax.
    assert cached == expected or pair.source.family.model_type == "minimax"
    slim = load(pair.slim)
    assert greedy(slim, use_cache=True).tolist() == cached
    assert greedy(slim, use_cache=False).tolist() == expected


@pytest.mark.slow
def test_saved_and_loaded_again_it_is_the_same(pair: Pair, tmp_path: Path) -> None:
    slim = load(pair.slim)
    with quiet_transformers():
        slim.save_pretrained(tmp_path)
    assert open_checkpoint(tmp_path).layers == open_checkpoint(pair.slim).layers
    again = load(tmp_path)
    assert type(again) is type(slim)
    assert (exact_logits(again) - exact_logits(slim)).abs().max().item() <= 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_stock_model(
    name: str, dense: Callable[[str], Checkpoint]
) -> None:
    model, shape = load(dense(name).path), dense(name).shape
    stored = ("act_fn", "e_score_correction_bias", "slope_rate", "_decay", "layer_scalar")
    buffers = sum(
        buffer.numel() for name, buffer in model.named_buffers() if any(x in name for x in stored)
    )
    assert shape.parameters(shape.layers) == model.num_parameters() + buffers
    cached = model(tokens(), use_cache=True).past_key_values
    layers = getattr(cached, "layers", None)
    assert layers is not None
    stored_of_heads = [layer for layer in layers if getattr(layer, "keys", None) is not None]
    assert shape.kv_bytes_per_token(shape.layers, 1) == sum(
        part.shape[1] * part.shape[3]
        for layer in stored_of_heads
        for part in (layer.keys, layer.values)
    )


@pytest.mark.parametrize(
    "name", but_in_old(KNOWN, {"cohere"}, "its default base of rotary positions is another")
)
def test_what_config_json_leaves_out_is_as_the_stock_class_has_it(name: str) -> None:
    """Sizes, ties and biases of a config.json that says nothing else."""
    family, stock = FAMILIES[name], CONFIG_MAPPING[name]
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 97}
    named = {family.keys.get(key, key): size for key, size in sizes.items()}
    named.pop("", None)
    named |= EXPERTS.get(name, {})
    if name == "nemotron_h":  # its default is of 4 layers
        named["layers_block_type"] = ["full_attention", "mlp"]
    if name == "gpt_neo":  # its default is of 24 layers
        named["attention_types"] = [[["global", "local"], 1]]
    if name == "deepseek_v3":  # its default is of 8 groups
        named["n_routed_experts"] = 16
    settings: Any = stock(**named, pad_token_id=0)
    shape = family.read_shape({"model_type": name, **named}, 4)
    whole = settings.to_dict()
    written = whole if family.by_layer else {key: getattr(settings, key) for key in whole}
    assert shape == family.read_shape({**written, **named}, 4)
    assert shape.tied_embeddings == settings.tie_word_embeddings
    theta = (getattr(settings, "rope_parameters", None) or written).get("rope_theta")
    assert family.rope_theta in (None, theta)


def test_only_llamas_and_what_computes_as_they_do_have_no_features() -> None:
    """What a method would otherwise take for a Llama."""
    plain = {name for name, family in FAMILIES.items() if not family.features}
    assert plain == {"llama", "mistral", "qwen2", "qwen3", "seed_oss", "ministral", "cwm"}
    for family in FAMILIES.values():
        assert (family.experts is not None) == (Feature.EXPERTS in family.features)
        assert (family.head_rows != ()) == (Feature.SINKS in family.features)
        assert (family.mixers is not None) == (Feature.MIXERS in family.features)
        assert (family.query_inputs != "") == (Feature.LATENT in family.features)
        assert (family.wide_norms != {}) == (Feature.WIDE_NORM in family.features)
        if family.experts:
            own = 3 if family.down else 0  # of layers without experts
            latent = Feature.LATENT in family.features
            assert len(family.projections) == (3 if latent else 4) + own
            continue
        fused = len(family.projections) < (6 if family.gate == "" else 7)
        assert fused == (Feature.FUSED in family.features)
        assert (family.gate == "") == (Feature.NO_GATE in family.features)


@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_tensors_may_be_named_as_in_the_decoder(name: str, tmp_path: Path) -> None:
    """As these two were published."""
    source = open_source(make_dense(name, tmp_path / "dense"))
    whole = load_file(tmp_path / "dense" / "model.safetensors")
    short = {key.removeprefix("transformer."): value for key, value in whole.items()}
    save_file(short, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    again = open_source(tmp_path / "dense")
    assert again.tensors.keys() == source.tensors.keys()
    pair = make_slim(again, "per-layer", tmp_path / "slim")
    with pair.masked() as masked:
        assert (exact_logits(load(pair.slim)) - exact_logits(masked)).abs().max().item() <= 1e-12


@pytest.mark.parametrize("name", KNOWN)
def test_the_classes_that_config_json_names_are_there(name: str) -> None:
    """What `trust_remote_code` asks the travelling files for."""
    family = FAMILIES[name]
    prefix = family.architecture.removesuffix("ForCausalLM")
    config, decoder = family.config_class or f"{prefix}Config", family.decoder_class
    assert getattr(transformers, config) is CONFIG_MAPPING[name]
    assert hasattr(transformers, decoder or f"{prefix}Model")
    assert hasattr(transformers, family.architecture)

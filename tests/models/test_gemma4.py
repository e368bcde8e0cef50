"""Gemma 4: which heads go and which stay, by whatever words a config.json says it in."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_models import FORMS, SHARING, VALUES, make_dense
from old_transformers import ABSENT, since_5
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from vision_models import CONFIGS, IMAGE

from spp_export.common.errors import ModelError
from spp_export.evaluation.contract import (
    LIMIT,
    exact_logits,
    load_exact,
    make_slim,
    write_random,
)
from spp_export.models.checkpoint.checkpoint import open_checkpoint, open_source
from spp_export.models.families import family_of
from spp_export.models.shape import ModelShape

pytestmark = since_5(ABSENT)
SIZES: dict[str, Any] = {"model_type": "gemma4_text", "hidden_size": 32, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24, "vocab_size": 97}


def shape_of(config: dict[str, Any]) -> ModelShape:
    return family_of({**SIZES, **config}).read_shape({**SIZES, **config}, 2)


def test_heads_that_others_read_or_of_another_size_stay() -> None:
    """Layers: three sliding, full, and two that read the third's and the fourth's keys."""
    shape = shape_of(SHARING)
    assert shape.without_heads == {2, 3, 4, 5}
    assert not shape.without_channels
    assert shape_of(VALUES).without_heads == {3, 5}
    wide = shape_of({**SHARING, "use_double_wide_mlp": True})
    assert wide.without_channels == {4, 5}
    assert shape_of({**VALUES, "use_double_wide_mlp": True}).without_channels == set()
    family = family_of({**SIZES, **SHARING, "use_double_wide_mlp": True})
    assert (family.uniform, family_of({**SIZES, **SHARING}).uniform) == ("", "channels")
    (remark,) = family.remarks
    assert remark.endswith("keys and values, and MLPs of double width stay as they are")


def test_what_stays_is_in_the_cache_that_is_counted() -> None:
    """Three layers of two KV heads of 8, one of two of 16; the last two cache nothing."""
    shape = shape_of(SHARING)
    assert shape.kv_bytes_per_token(shape.layers, 1) == 2 * (3 * 2 * 8 + 2 * 16)


def test_full_attention_is_told_of_in_two_ways() -> None:
    """By the keys of published models, and by what transformers writes of them."""
    for form in (SHARING, VALUES, FORMS["gemma4-experts"][1]):
        written = AutoConfig.for_model(**SIZES, **form).to_dict()
        assert "global_head_dim" not in written
        assert shape_of(written) == shape_of(form)
    kinds = {key: SHARING[key] for key in ("num_hidden_layers", "hidden_size_per_layer_input")}
    defaults = AutoConfig.for_model(**SIZES, **kinds).to_dict()
    assert shape_of(defaults).mixers[5] == shape_of(kinds).mixers[5]
    assert ("self_attn.q_proj.weight", (4 * 512, 32)) in shape_of(kinds).mixers[5]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"use_bidirectional_attention": "all"},
            "use_bidirectional_attention is 'all'; the record",
        ),
        ({"enable_moe_block": True, "use_double_wide_mlp": True}, "use_double_wide_mlp is true, "),
        ({"per_layer_config": {"0": {"head_dim": 4}}}, "per_layer_config has other sizes than one"),
        ({"per_layer_config": {"0": {"intermediate_size": 4}}}, "so its layers already differ"),
        ({"per_layer_config": {"0": {"num_attention_heads": 4}}}, "so its layers already differ"),
        ({"per_layer_config": []}, "so its layers already differ"),
        ({"num_kv_shared_layers": 6}, "num_kv_shared_layers be fewer; got .* and 6"),
        ({"layer_types": ["linear_attention"] * 6}, "layer_types must name sliding_attention or"),
        ({"layer_types": ["full_attention"]}, "layer_types must name sliding_attention or"),
    ],
)
def test_what_no_record_can_tell_is_refused_by_its_field(
    more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message) as refused:
        shape_of({**SHARING, **more})
    assert "\n" not in str(refused.value)


def test_keys_that_no_model_reads_are_left_out(tmp_path: Path) -> None:
    """As layers that read those of others were published; of other layers they are unknown."""
    dense = make_dense("gemma4_text", tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    names = ("k_proj.weight", "v_proj.weight", "k_norm.weight")
    source = open_source(dense)
    for name in names:
        own = tensors[f"model.layers.2.self_attn.{name}"]
        tensors[f"model.layers.4.self_attn.{name}"] = own.clone()
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    again = open_source(dense)
    assert again.fingerprint == source.fingerprint
    pair = make_slim(again, "per-layer", tmp_path / "slim")
    assert open_checkpoint(pair.slim).tensors.keys() == source.tensors.keys()
    with pair.masked() as masked:
        assert (exact_logits(load_exact(pair.slim)) - exact_logits(masked)).abs().max() <= LIMIT
    tensors["model.layers.0.self_attn.v_norm.weight"] = torch.ones(8)
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    with pytest.raises(Exception, match=r"layers\.0\.self_attn\.v_norm\.weight' is unknown"):
        open_source(dense)


def test_a_slim_config_keeps_the_sizes_of_the_stock_class(tmp_path: Path) -> None:
    source = open_source(make_dense("gemma4-values", tmp_path / "dense"))
    slim = make_slim(source, "per-layer", tmp_path / "slim").slim
    config = json.loads((slim / "config.json").read_text())
    full = {"head_dim": 16, "num_key_value_heads": 1}
    assert config["stock_per_layer_config"] == {"3": full, "5": full}
    assert full.items() <= config["per_layer_config"]["5"].items()
    assert "head_dim" not in config["per_layer_config"]["0"]
    loaded: Any = load_exact(slim)
    for index, layer in enumerate(loaded.model.layers):
        assert layer.self_attn.head_dim == (16 if index in (3, 5) else 8)
    again: Any = copy.deepcopy(loaded)
    assert torch.equal(exact_logits(again), exact_logits(loaded))


@torch.no_grad()
def test_it_answers_about_a_picture_that_the_stock_processor_read(tmp_path: Path) -> None:
    from transformers import Gemma4ImageProcessorPil

    config = copy.deepcopy(CONFIGS["gemma4"])
    config["vision_config"]["position_embedding_size"] = 64
    dense = write_random(AutoConfig.for_model("gemma4", **config), tmp_path / "dense")
    pair = make_slim(open_source(dense), "ragged", tmp_path / "slim")
    processor = Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70, pooling_kernel_size=3)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    seen = processor(pixels, return_tensors="pt")
    (count,) = seen.pop("num_soft_tokens_per_image")
    ids = torch.tensor([[5, 92, *[IMAGE] * int(count), 93, 17, 33]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **seen}
    inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    length = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 5, "min_new_tokens": 5}
    length["suppress_tokens"] = [*range(IMAGE, 97)]
    slim: Any = load_exact(pair.slim)
    with pair.masked() as masked:
        expected, follows = exact_logits(masked, **inputs), masked.generate(**inputs, **length)
    assert (exact_logits(slim, **inputs) - expected).abs().max().item() <= LIMIT
    assert torch.equal(slim.generate(**inputs, **length), follows)

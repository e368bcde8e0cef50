"""Switches of a config.json that bring what a record does not tell of: refused by their names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from family_models import EXPERTS, make_dense
from old_transformers import since_5

from spp_export.common.errors import ModelError
from spp_export.evaluation.contract import prove
from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.models.families import FAMILIES

SIZES: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
SIZES |= {"intermediate_size": 24, "num_key_value_heads": 2, "vocab_size": 97}
# Switches that change what a stock class computes, and that no record has to know: in a slim model
# they do the same.
OTHERWISE: tuple[tuple[str, dict[str, Any]], ...] = (
    *((name, {"norm_topk_prob": True}) for name in ("olmoe", "qwen3_moe", "qwen2_moe", "dots1")),
    *((name, {"norm_topk_prob": False}) for name in ("glm4_moe", "qwen3_next", "deepseek_v3")),
    ("llama4_text", {"use_qk_norm": False}),
    ("llama4_text", {"attn_temperature_tuning": False}),
    ("deepseek_v3", {"rope_interleave": False}),
    ("falcon_h1", {"mamba_norm_before_gate": False}),
    ("gpt2", {"scale_attn_weights": False}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", {"reorder_and_upcast_attn": True}),
    ("gpt_bigcode", {"scale_attn_weights": False}),
)
REFUSED = [(name, key) for name, family in FAMILIES.items() for key in family.refused]


@pytest.mark.parametrize(("name", "key"), REFUSED)
def test_what_a_record_has_no_field_for_is_refused_by_name(name: str, key: str) -> None:
    family = FAMILIES[name]
    switch, _, given = key.removeprefix("!").partition("=")
    wrong: Any = given or key == switch
    sizes = {family.keys.get(size, size): count for size, count in SIZES.items()}
    sizes.pop("", None)
    config = {**sizes, **EXPERTS.get(name, {})}
    family.read_shape(config, 4)
    family.read_shape({**config, switch: None if given else not wrong}, 4)
    told = f"config.json: {switch} is {wrong!r}; the record of the {name} family"
    with pytest.raises(ModelError, match=f"^{re.escape(told)} has no field for what comes with"):
        family.read_shape({**config, switch: wrong}, 4)


def test_what_refuses_these_switches_is_known() -> None:
    """A record that loses one would take a model for another."""
    assert {
        ("bloom", "apply_residual_connection_post_layernorm"),
        ("bloom", "slow_but_exact"),
        ("phi", "qk_layernorm"),
        ("gpt2", "add_cross_attention"),
        *((name, "use_bidirectional_attention") for name in ("gemma", "gemma2", "gemma3_text")),
    } <= {*REFUSED}


@pytest.mark.slow
@since_5("not all of its classes have them all")
@pytest.mark.parametrize(("name", "switches"), OTHERWISE)
def test_what_no_record_has_to_know_is_the_same_in_a_slim_model(
    name: str, switches: dict[str, Any], tmp_path: Path
) -> None:
    source = open_source(make_dense(name, tmp_path / "dense", **switches))
    prove(source, "ragged" if source.family.uneven_groups else "per-layer", tmp_path / "slim")

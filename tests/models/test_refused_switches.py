"""Switches of a config.json that bring what a record does not tell of: refused by their names."""

from __future__ import annotations

import re
from typing import Any

import pytest
from family_models import EXPERTS

from spp_export.common.errors import ModelError
from spp_export.models.families import FAMILIES

SIZES: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
SIZES |= {"intermediate_size": 24, "num_key_value_heads": 2, "vocab_size": 97}
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
        ("phi", "qk_layernorm"),
        ("gpt2", "add_cross_attention"),
    } <= {*REFUSED}

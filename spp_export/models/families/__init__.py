"""The families that can be sliced, a record each. Only this package knows tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from spp_export.common.errors import ModelError
from spp_export.common.json_files import shown
from spp_export.models.families import table
from spp_export.models.families.base import Family, Feature, Role, TensorSpec, Unit, vocabulary_size
from spp_export.models.families.computed import COMPUTED
from spp_export.models.quantised import check_not_quantised

__all__ = [
    "FAMILIES",
    "OWN",
    "Family",
    "Feature",
    "Role",
    "TensorSpec",
    "Unit",
    "family_of",
    "named_family",
    "vocabulary_size",
]

# What the model type of a checkpoint with layers that differ begins with.
OWN = "spp_"

FAMILIES: dict[str, Family] = {
    family.model_type: replace(family, computed=COMPUTED.get(family.model_type, family.computed))
    for family in table.FAMILIES
}


def named_family(config: Mapping[str, Any]) -> Family | None:
    """The family that the config.json of a dense or slim model names, if it is one of these."""
    name = config.get("model_type")
    family = FAMILIES.get(name.removeprefix(OWN)) if isinstance(name, str) else None
    return family.of(config) if family else None


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a parsed config.json; ModelError names what is unknown."""
    model_type = config.get("model_type")
    check_not_quantised(config)
    if "per_layer_config" in config:
        raise ModelError(
            "config.json: the checkpoint has per_layer_config, so its layers already differ. "
            "Slice the dense model it came from."
        )
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ModelError(
            f"config.json: model_type {shown(model_type)} is not supported; known are "
            f"{', '.join(sorted(FAMILIES))}."
        )
    return family.of(config)

"""The families that can be sliced, a record each. Only this package knows tensor names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from spp_export.common.errors import ModelError
from spp_export.common.json_files import shown
from spp_export.models.families import table
from spp_export.models.families.base import Family, Feature, Role, TensorSpec, Unit, vocabulary_size
from spp_export.models.families.computed import COMPUTED
from spp_export.models.families.nested import decoder_settings
from spp_export.models.quantised import check_not_quantised

__all__ = [
    "FAMILIES",
    "OWN",
    "Family",
    "Feature",
    "Role",
    "TensorSpec",
    "Unit",
    "decoder_settings",
    "family_of",
    "known",
    "known_types",
    "layers_differ",
    "record_of",
    "vocabulary_size",
]

FAMILIES: dict[str, Family] = {
    family.model_type: replace(family, computed=COMPUTED.get(family.model_type, family.computed))
    for family in table.FAMILIES
}
_WRAPPERS = {wrapper.model_type: wrapper for wrapper in table.WRAPPERS}
_TEXTS = {family.model_type: family for family in table.TEXTS}
# What the model type of a checkpoint with layers that differ begins with.
OWN = "spp_"


def known_types() -> list[str]:
    """Every model type that can be sliced, in order."""
    return sorted({*FAMILIES, *_WRAPPERS})


def record_of(config: Mapping[str, Any]) -> Family | None:
    """The record of a config.json, a slim one's too; None where no record has its model type."""
    model_type = str(config.get("model_type")).removeprefix(OWN)
    if model_type in _WRAPPERS:
        return _WRAPPERS[model_type].family(config, FAMILIES | _TEXTS)
    return FAMILIES.get(model_type)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a parsed config.json; ModelError names what is unknown."""
    check_not_quantised(config)
    model_type = config.get("model_type")
    if layers_differ(config):
        raise ModelError(
            "config.json: the checkpoint has per_layer_config, so its layers already differ. "
            "Slice the dense model it came from."
        )
    family = record_of(config) if model_type in known_types() else None
    if family is None:
        raise ModelError(
            f"config.json: model_type {shown(model_type)} is not supported; known are "
            f"{', '.join(known_types())}."
        )
    return family.of(config)


def layers_differ(config: Mapping[str, Any]) -> bool:
    """Whether a config.json has sizes of single layers in which the stock class has all alike."""
    listed = decoder_settings(config).get("per_layer_config")
    if listed is None or str(config.get("model_type")).startswith(OWN):
        return listed is not None
    family = record_of(config)
    own = set(family.by_layer if family else ())
    layers = listed.values() if isinstance(listed, Mapping) else ({"": None},)
    return not all(isinstance(layer, Mapping) and layer.keys() <= own for layer in layers)


@contextmanager
def known(family: Family) -> Iterator[None]:
    """Have a record beside those of the table while the context is open."""
    before = FAMILIES.get(family.model_type)
    FAMILIES[family.model_type] = family
    try:
        yield
    finally:
        if before is None:
            del FAMILIES[family.model_type]
        else:
            FAMILIES[family.model_type] = before

"""A checkpoint whose layers may differ, dense or slim, checked against its own config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spp_export.common.errors import CheckpointError, ModelError
from spp_export.common.json_files import shown
from spp_export.models.checkpoint.dtypes import ELEMENT_BYTES, FLOAT_DTYPES
from spp_export.models.checkpoint.header import StoredTensor, show
from spp_export.models.checkpoint.reader import stored_tensors
from spp_export.models.checkpoint.source import open_source, read_config
from spp_export.models.families import FAMILIES, Family
from spp_export.models.shape import LayerShape, Layout, ModelShape

_OWN = "spp_"
_MAX_DIGITS = 9


@dataclass(frozen=True)
class Layered:
    """A slim or dense checkpoint; of its weights only headers were read.

    shape    the dense model's counts, with the biases that are in the files
    layers   what each layer really has
    layout   "uniform" where all layers are alike, as in a dense model
    tensors  those of the family by name, and no others
    """

    config: Mapping[str, Any]
    family: Family
    shape: ModelShape
    layers: tuple[LayerShape, ...]
    layout: Layout
    tensors: Mapping[str, StoredTensor]


def open_layered(directory: Path) -> Layered:
    """Open a checkpoint of any layout; config and headers are read, no weights.

    Raises ModelError for a model we do not know or whose config contradicts itself,
    CheckpointError for files that are malformed or whose tensors are not those of the config.
    """
    config = read_config(directory)
    model_type = str(config.get("model_type"))
    if "per_layer_config" not in config:
        source = open_source(directory)
        shape, layers = source.shape, source.shape.layers
        return Layered(config, source.family, shape, layers, "uniform", source.tensors)
    own = model_type.startswith(_OWN)
    family = FAMILIES.get(model_type.removeprefix(_OWN)) if own else None
    if family is None:
        raise ModelError(
            f"{directory}: model_type {shown(model_type)} with per_layer_config is not supported; "
            f"known are {', '.join(f'{_OWN}{name}' for name in sorted(FAMILIES))}."
        )
    if config.get("quantization_config") is not None:
        raise ModelError(
            f"{directory}: config.json has quantization_config, which spp never writes. "
            "Write the export again."
        )
    stored = stored_tensors(directory)
    shape = _shape(config, family, stored)
    if shape.num_layers > len(stored):
        raise CheckpointError(
            f"{directory}: config.json says {shape.num_layers} layers, the files hold only "
            f"{len(stored)} tensors. Write the export again."
        )
    layers = _layers(config["per_layer_config"], shape, directory)
    tensors = _tensors(family, shape, layers, stored, directory)
    layout: Layout = "per-layer" if all(layer.regular for layer in layers) else "ragged"
    return Layered(config, family, shape, layers, layout, tensors)


def _shape(
    config: Mapping[str, Any], family: Family, stored: Mapping[str, StoredTensor]
) -> ModelShape:
    probe = stored.get(f"{family.layer_name(0, family.query)}.weight")
    shape = family.read_shape(config, ELEMENT_BYTES[probe.dtype] if probe else 2)
    biased = config.get("biased_projections", [])
    known = (family.output, family.down)
    if not isinstance(biased, list) or any(name not in known for name in biased):
        raise ModelError(
            f"config.json: biased_projections must be a list of {' and '.join(known)}, got "
            f"{shown(biased)}. Write the export again."
        )
    return dataclasses.replace(
        shape,
        output_bias=shape.output_bias or family.output in biased,
        down_bias=shape.down_bias or family.down in biased,
    )


def _layers(listed: Any, shape: ModelShape, directory: Path) -> tuple[LayerShape, ...]:
    wrong = ModelError(
        f"{directory / 'config.json'}: per_layer_config must give every one of the "
        f"{shape.num_layers} layers its head counts and its width. Write the export again."
    )
    if not isinstance(listed, Mapping) or len(listed) != shape.num_layers:
        raise wrong
    digits = (key.isascii() and key.isdigit() and len(key) <= _MAX_DIGITS for key in listed)
    if not all(digits):
        raise wrong
    by_index = {int(key): value for key, value in listed.items()}
    layers = [_layer(by_index.get(index)) for index in range(shape.num_layers)]
    found = tuple(layer for layer in layers if layer is not None)
    if len(found) < len(layers):
        raise wrong
    return found


def _layer(entry: Any) -> LayerShape | None:
    """One layer's entry; None where it is malformed."""
    if not isinstance(entry, Mapping):
        return None
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    sizes: list[Any] = [entry.get(name) for name in names]
    groups = entry.get("query_groups", [])
    if not isinstance(groups, list):
        return None
    if any(type(size) is not int or size < 1 for size in (*sizes, *groups)):
        return None
    query, kv, channels = sizes
    if groups and (len(groups) != kv or sum(groups) != query):
        return None
    layer = LayerShape(query, kv, channels, tuple(groups) if len(set(groups)) > 1 else ())
    return layer if layer.groups or layer.regular else None


def _tensors(
    family: Family,
    shape: ModelShape,
    layers: tuple[LayerShape, ...],
    stored: Mapping[str, StoredTensor],
    directory: Path,
) -> dict[str, StoredTensor]:
    expected = {spec.name: spec.shape for spec in family.tensors(shape, layers)}
    odd = sorted(name for name in expected.keys() ^ stored.keys() if not family.is_obsolete(name))
    if odd:
        more = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
        where = "missing" if odd[0] in expected else "not of this model"
        raise CheckpointError(
            f"{directory}: tensor {show(odd[0])}{more} is {where}. Write the export again."
        )
    for name, wanted in expected.items():
        tensor = stored[name]
        if tensor.shape != wanted:
            raise CheckpointError(
                f"{directory}: tensor {show(name)} has shape {list(tensor.shape)}, "
                f"expected {list(wanted)} from config.json. Write the export again."
            )
        if tensor.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{directory}: tensor {show(name)} is {tensor.dtype}, expected one of "
                f"{', '.join(FLOAT_DTYPES)}. Write the export again."
            )
    return {name: stored[name] for name in expected}

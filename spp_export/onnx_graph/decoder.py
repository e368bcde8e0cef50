"""A checkpoint on disk as the graph builder sees it: sizes, settings, where each tensor lies."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spp_export.checkpoint.dtypes import ELEMENT_BYTES
from spp_export.checkpoint.header import StoredTensor, show
from spp_export.checkpoint.reader import stored_tensors
from spp_export.checkpoint.source import open_source, read_config
from spp_export.errors import CheckpointError, ModelError
from spp_export.families import FAMILIES, Family
from spp_export.onnx_graph.settings import Settings, stock_settings
from spp_export.shape import LayerShape, ModelShape

_OWN = "spp_"


@dataclass(frozen=True)
class Decoder:
    """A slim or dense checkpoint.

    shape     the dense model's counts, with the biases that are in the files
    layers    what each layer really has
    settings  what the stock class of the family would make of the config
    """

    config: Mapping[str, Any]
    family: Family
    shape: ModelShape
    layers: tuple[LayerShape, ...]
    layout: str
    settings: Settings
    tensors: Mapping[str, StoredTensor]

    def tensor(self, module: str, layer: int | None = None, kind: str = "weight") -> StoredTensor:
        """The weight or bias of a module, by its name in the family."""
        return self.tensors[f"{self._path(module, layer)}.{kind}"]

    def bias(self, module: str, layer: int) -> StoredTensor | None:
        """A projection's bias, where it has one."""
        return self.tensors.get(f"{self._path(module, layer)}.bias")

    def _path(self, module: str, layer: int | None) -> str:
        return module if layer is None else self.family.layer_name(layer, module)


def read_decoder(directory: Path) -> Decoder:
    """Open a dense, uniform or per-layer checkpoint; config and headers are read, no weights.

    Raises ModelError for a model we cannot express, CheckpointError for tensors that are not
    exactly those of its config.
    """
    config = read_config(directory)
    model_type = str(config.get("model_type"))
    if "per_layer_config" not in config or not model_type.startswith(_OWN):
        source = open_source(directory)
        family, shape, layers = source.family, source.shape, source.shape.layers
        layout, tensors = "uniform", source.tensors
    else:
        family = _family(model_type.removeprefix(_OWN), directory)
        tensors = stored_tensors(directory)
        shape, layers = _per_layer(config, family, tensors, directory)
        layout = "per-layer"
    return Decoder(
        config=config,
        family=family,
        shape=shape,
        layers=tuple(layers),
        layout=layout,
        settings=stock_settings(config, family, shape, directory),
        tensors=tensors,
    )


def _family(model_type: str, directory: Path) -> Family:
    if model_type not in FAMILIES:
        raise ModelError(
            f"{directory}: model_type {model_type!r:.40} is not supported; known are "
            f"{', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[model_type]


def _per_layer(
    config: Mapping[str, Any],
    family: Family,
    tensors: Mapping[str, StoredTensor],
    directory: Path,
) -> tuple[ModelShape, tuple[LayerShape, ...]]:
    probe = tensors.get(f"{family.layer_name(0, family.query)}.weight")
    shape = family.read_shape(config, ELEMENT_BYTES[probe.dtype] if probe else 2)
    biased = config.get("biased_projections", ())
    shape = dataclasses.replace(
        shape,
        output_bias=shape.output_bias or family.output in biased,
        down_bias=shape.down_bias or family.down in biased,
    )
    layers = _layers(config["per_layer_config"], shape, directory)
    expected = {spec.name: spec.shape for spec in family.tensors(shape, layers)}
    if odd := sorted(expected.keys() ^ tensors.keys()):
        where = "missing" if odd[0] in expected else "not of this model"
        raise CheckpointError(
            f"{directory}: tensor {show(odd[0])} is {where}. Write the export again."
        )
    for name, wanted in expected.items():
        if tensors[name].shape != wanted:
            raise CheckpointError(
                f"{directory}: tensor {show(name)} has shape {list(tensors[name].shape)}, "
                f"expected {list(wanted)} from config.json. Write the export again."
            )
    return shape, layers


def _groups(layer: Mapping[str, Any]) -> tuple[int, ...]:
    """Query heads of each KV head of a ragged layer; empty for a regular one."""
    sizes = tuple(layer.get("query_groups", ()))
    return sizes if len(set(sizes)) > 1 else ()


def _layers(listed: Any, shape: ModelShape, directory: Path) -> tuple[LayerShape, ...]:
    wrong = ModelError(
        f"{directory / 'config.json'}: per_layer_config must give every one of the "
        f"{shape.num_layers} layers its head counts and its width. Write the export again."
    )
    if not isinstance(listed, Mapping):
        raise wrong
    try:
        by_index = {int(key): value for key, value in listed.items()}
        layers = tuple(
            LayerShape(
                by_index[index]["num_attention_heads"],
                by_index[index]["num_key_value_heads"],
                by_index[index]["intermediate_size"],
                _groups(by_index[index]),
            )
            for index in range(shape.num_layers)
        )
    except (KeyError, TypeError, ValueError):
        raise wrong from None
    sizes = [n for layer in layers for n in (layer.query_heads, layer.kv_heads, layer.channels)]
    if len(by_index) != shape.num_layers or any(type(n) is not int or n < 1 for n in sizes):
        raise wrong
    for index, layer in enumerate(layers):
        if not layer.regular:
            raise ModelError(
                f"{directory}: layer {index} has {layer.query_heads} query heads over "
                f"{layer.kv_heads} KV heads; ONNX needs the same number for every KV head. "
                "Export with --pad, or use layout 'per-layer'."
            )
    return layers

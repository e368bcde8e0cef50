"""A checkpoint on disk as the graph builder sees it: sizes, settings, where each tensor lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spp_export.common.errors import ModelError
from spp_export.formats.onnx.settings import Settings, stock_settings
from spp_export.models.checkpoint.header import StoredTensor
from spp_export.models.checkpoint.layered import open_layered
from spp_export.models.families import Family
from spp_export.models.shape import LayerShape, ModelShape


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
    found = open_layered(directory)
    for index, layer in enumerate(found.layers):
        if not layer.regular:
            raise ModelError(
                f"{directory}: layer {index} has {layer.query_heads} query heads over "
                f"{layer.kv_heads} KV heads; this format needs the same number for every KV head. "
                "Export with --pad, or use layout 'per-layer'."
            )
    return Decoder(
        config=found.config,
        family=found.family,
        shape=found.shape,
        layers=found.layers,
        layout=found.layout,
        settings=stock_settings(found.config, found.family, found.shape, directory),
        tensors=found.tensors,
    )

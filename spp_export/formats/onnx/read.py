"""The weights that a written graph holds, under the names of the checkpoint they came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spp_export.common.errors import CheckpointError, reason_of
from spp_export.formats.onnx.expert_weights import ENTERS, Place, apart, as_stored, mlp_parts
from spp_export.formats.onnx.names import HEAD, initializer_name, product_name
from spp_export.formats.onnx.options import require
from spp_export.formats.onnx.projection import EMBEDDING
from spp_export.formats.onnx.quantise import Quantised, dequantise
from spp_export.formats.onnx.untrusted import read_graph
from spp_export.formats.onnx.write import GRAPH_NAME
from spp_export.formats.parts import outputs_of
from spp_export.models.families import Family, Role, TensorSpec
from spp_export.models.shape import LayerShape, ModelShape

Floats = NDArray[np.floating[Any]]


class GraphWeights:
    """Reads one tensor at a time, as float32 in PyTorch's layout; quantised ones as they multiply.

    shape   as of `Family.tensors`: which biases there are
    layers  what each layer has
    """

    def __init__(
        self, directory: Path, family: Family, shape: ModelShape, layers: Sequence[LayerShape]
    ) -> None:
        graph = _graph(directory)
        self._initializers: Mapping[str, Any] = graph.initializers
        self._bits = {
            node.inputs[1].name: node.attributes["bits"].as_int()
            for node in graph
            if node.op_type == "MatMulNBits"
        }
        self._family, self._shape, self._layers = family, shape, layers
        self._experts = shape.experts_in(layers)

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """The tensors that the checkpoint had."""
        return tuple(self._family.tensors(self._shape, self._layers))

    def in_few_bits(self, spec: TensorSpec) -> bool:
        """Whether a quantised graph holds a tensor in few bits."""
        module, _, kind = spec.name.rpartition(".")
        if module == self._family.embedding:
            return self._shape.tied_embeddings  # else rows are read as they are
        return kind == "weight" and (module in self._outside or spec.role is not Role.OTHER)

    def read(self, name: str) -> Floats:
        """A tensor by its name in the checkpoint. CheckpointError where the graph lacks it."""
        family = self._family
        module, _, kind = name.rpartition(".")
        if module == family.embedding:
            return self._embedding()
        if module in self._outside:
            product = product_name(family, module)
            return self._plain(f"{product}.bias") if kind == "bias" else self._matrix(product).T
        inside = module.removeprefix(f"{family.layers}.")
        index, _, role = inside.partition(".")
        if inside != module and role in family.projections:
            return self._projection(int(index), role, kind)
        sparse = inside != module and self._shape.sparse[int(index)]
        found = self._of_mlp(int(index), name) if sparse else None
        return self._plain(initializer_name(family, name)) if found is None else found

    def _of_mlp(self, index: int, name: str) -> Floats | None:
        """A tensor of what a layer with experts has in the place of an MLP; None of any other, or
        of one that the graph has as it is."""
        family = self._family
        assert family.experts is not None
        parts = mlp_parts(family.experts, self._shape.mlps[index])
        inside = name.removeprefix(family.layer_name(index, ""))
        module, _, kind = inside.rpartition(".")
        if module in parts.modules and kind == "weight":
            return self._matrix(f"layers.{index}.{module}").T
        if (place := parts.place_of(inside)) is None:
            return None
        experts = [int(place.number)] if place.number else range(self._experts[index])
        tensors = parts.routed[place.product, place.kind]
        stored = [
            as_stored(self._expert(index, place, expert), tensors, place.tensor, place.product)
            for expert in experts
        ]
        return stored[0] if place.number else np.stack(stored)

    def _expert(self, index: int, place: Place, expert: int) -> Floats:
        """An expert's weight [outputs, inputs] or bias in a product, as of `ExpertReader.one`."""
        layer, product = f"layers.{index}.experts", place.product
        whole = f"{layer}.{product}.{place.kind}"
        if whole not in self._initializers:
            return self._plain(f"{layer}.{expert}.{product}.{place.kind}").T
        values = self._array(whole)[expert].astype(np.float32)
        paired = product == ENTERS and f"{layer}.{ENTERS}.weight" in self._initializers
        return apart(values) if paired else values

    @property
    def _outside(self) -> tuple[str, ...]:
        """Modules of products beside the layers."""
        return (self._family.head, *self._family.embedding_projections)

    def _projection(self, index: int, module: str, kind: str) -> Floats:
        """A projection's weight or bias, put together of what the graph has of its roles."""
        family, layer = self._family, self._layers[index]
        rows = outputs_of(family, self._shape, layer)
        parts = []
        for role, part in rows.items():
            if family.projection(role) == module:
                product, columns = self._product(role, layer)
                product = f"layers.{index}.{product}"
                if kind == "bias":
                    parts.append((part, self._plain(f"{product}.bias")[columns]))
                else:
                    parts.append((part, self._matrix(product)[:, columns].T))
        if len(parts) == 1:
            values = parts[0][1]
        else:
            total = sum(len(part) for _, part in parts)
            values = np.empty((total, *parts[0][1].shape[1:]), np.float32)
            for part, of_role in parts:
                values[part] = of_role
        return values.T if family.transposed and kind == "weight" else values

    def _product(self, role: Role, layer: LayerShape) -> tuple[str, slice]:
        """The product that a role is part of, and its columns there."""
        query, kv = (n * self._shape.head_dim for n in (layer.query_heads, layer.kv_heads))
        return {
            Role.QUERY: ("qkv_proj", slice(0, query)),
            Role.KEY: ("qkv_proj", slice(query, query + kv)),
            Role.VALUE: ("qkv_proj", slice(query + kv, query + 2 * kv)),
            Role.OUTPUT: ("o_proj", slice(None)),
            Role.GATE: ("gate_proj", slice(None)),
            Role.UP: ("up_proj", slice(None)),
            Role.DOWN: ("down_proj", slice(None)),
        }[role]

    def _embedding(self) -> Floats:
        if f"{EMBEDDING}.weight" in self._initializers:
            return self._plain(f"{EMBEDDING}.weight")
        return self._matrix(EMBEDDING).T

    def _matrix(self, name: str) -> Floats:
        """A product's weight [in, out]."""
        if f"{name}.weight" in self._initializers:
            return self._plain(f"{name}.weight")
        if f"{name}.int8" in self._initializers:
            return self._plain(f"{name}.int8") * self._plain(f"{name}.scales")
        blocks = self._array(f"{name}.quantised")
        scales = self._plain(f"{name}.scales")
        zeros = self._array(f"{name}.zero_points")
        sizes = {"K": self._depth(name), "bits": self._bits[f"{name}.quantised"]}
        return dequantise(Quantised(blocks, scales, zeros, sizes))

    def _depth(self, name: str) -> int:
        """Inputs of a product."""
        enters = self._family.embedding_projections[:1]
        if name in (HEAD, EMBEDDING, *enters):
            return self._shape.embedding_width
        index, _, role = name.removeprefix("layers.").partition(".")
        if role == "o_proj":
            return self._layers[int(index)].query_heads * self._shape.head_dim
        if role == "down_proj":
            return self._layers[int(index)].channels
        return self._shape.hidden_size

    def _plain(self, name: str) -> Floats:
        return self._array(name).astype(np.float32)

    def _array(self, name: str) -> NDArray[Any]:
        if name not in self._initializers:
            raise CheckpointError(
                f"{GRAPH_NAME}: has no weight {name!r}. It was not written by this version of spp."
            )
        array: NDArray[Any] = self._initializers[name].const_value.numpy()
        return array


def _graph(directory: Path) -> Any:
    onnx_ir = require("onnx_ir")
    read_graph(directory)  # which refuses data outside the directory
    path = directory / GRAPH_NAME
    try:
        model = onnx_ir.load(path)
    except Exception as error:  # protobuf's own kinds among them
        raise CheckpointError(f"{path}: cannot be read as ONNX: {reason_of(error)}") from error
    return model.graph

"""Collects the nodes and initialisers of one graph; every value gets a name, a type and a shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spp_export.formats.onnx.options import Precision, require
from spp_export.formats.onnx.weights import rounded

if TYPE_CHECKING:
    import onnx_ir as ir

MICROSOFT = "com.microsoft"
# transformers.js knows the batch by this very name.
BATCH, SEQUENCE, PAST, TOTAL = (
    "batch_size",
    "sequence_length",
    "past_sequence_length",
    "total_sequence_length",
)
Dimension = int | str
_DTYPES: Mapping[Precision, str] = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16"}

_ALIASES = "spp.aliases"


class Recorder:
    """A graph being built."""

    def __init__(self, precision: Precision) -> None:
        self.ir = require("onnx_ir")
        self.dtype: Any = self.ir.DataType[_DTYPES[precision]]
        self._precision = precision
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self._tape = self.ir.tape.Tape()
        self._constants: dict[str, ir.Value] = {}
        self._aliases: list[tuple[ir.Value, ir.Value]] = []

    def input(self, name: str, dtype: str, shape: Sequence[Dimension]) -> ir.Value:
        """A graph input; `dtype` is "INT64" or "" for the graph's own."""
        value: ir.Value = self._value(name, self._type(dtype), shape)
        self.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, shape: Sequence[Dimension]) -> None:
        """Make `value` a graph output under this name."""
        value.name, value.shape, value.dtype = name, self.ir.Shape(shape), self.dtype
        self.outputs.append(value)

    def op(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        shape: Sequence[Dimension] | None,
        *,
        dtype: str = "",
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """One node with one output; `dtype` as of `input`."""
        return self.ops(
            kind, inputs, name, [(name, shape)], dtype=dtype, domain=domain, **attributes
        )[0]

    def ops(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        outputs: Sequence[tuple[str, Sequence[Dimension] | None]],
        *,
        dtype: str = "",
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """One node with several outputs, each a name (empty: not used) and a shape."""
        typed = [(label, dtype, shape) for label, shape in outputs]
        return self.mixed(kind, inputs, name, typed, domain=domain, **attributes)

    def mixed(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        outputs: Sequence[tuple[str, str, Sequence[Dimension] | None]],
        *,
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """One node whose outputs have a name, a type and a shape each."""
        values = [self._value(label, self._type(dtype), shape) for label, dtype, shape in outputs]
        self._tape.op_multi_out(
            kind, inputs, attributes, outputs=values, domain=domain, name=f"{name}/{kind}"
        )
        return values

    def constant(self, values: Sequence[int] | int | NDArray[Any], name: str) -> ir.Value:
        """A small initialiser; integers are int64. Asking again for a name gives the first one,
        which must be the same."""
        array = values if isinstance(values, np.ndarray) else np.asarray(values, np.int64)
        if name not in self._constants:
            self._constants[name] = self._tape.initializer(self.ir.tensor(array, name=name))
        known: Any = self._constants[name].const_value
        assert np.array_equal(known.numpy(), array), f"two constants {name}"
        return self._constants[name]

    def number(self, value: float, name: str) -> ir.Value:
        """A small initialiser of one number of the graph's own type."""
        return self.numbers(np.asarray(value, np.float32), name)

    def numbers(self, values: NDArray[np.float32], name: str) -> ir.Value:
        """A small initialiser of the graph's own type."""
        return self.constant(rounded(values, self._precision), name)

    @property
    def lowest(self) -> NDArray[Any]:
        """The lowest finite number of the graph's type."""
        if self.dtype.name == "BFLOAT16":
            import ml_dtypes

            limits: Any = ml_dtypes.finfo
            return np.asarray(limits(ml_dtypes.bfloat16).min, ml_dtypes.bfloat16)
        kind = np.float32 if self.dtype.name == "FLOAT" else np.float16
        return np.asarray(np.finfo(kind).min, kind)

    def weight(
        self, name: str, shape: Sequence[int], make: Callable[[], NDArray[Any]], dtype: str = ""
    ) -> ir.Value:
        """An initialiser that `make` gives when it is written, and never before."""
        if name not in self._constants:
            kind = self._type(dtype)

            def evaluate() -> Any:
                array = make()
                assert array.shape == tuple(shape), f"{name}: {array.shape} is not {tuple(shape)}"
                return self.ir.Tensor(array, dtype=kind, name=name)

            lazy = self.ir.LazyTensor(evaluate, dtype=kind, shape=self.ir.Shape(shape), name=name)
            self._constants[name] = self._tape.initializer(lazy)
        return self._constants[name]

    def alias(self, name: str, of: ir.Value, shape: Sequence[int]) -> ir.Value:
        """An initialiser over the bytes of another one, in another shape.

        A Reshape would do in the graph, and be folded into a second copy in memory.
        """
        value: ir.Value = self._value(name, of.dtype, shape)
        self._aliases.append((value, of))
        return value

    def model(self, opsets: Mapping[str, int], ir_version: int, metadata: Mapping[str, str]) -> Any:
        """The finished ir.Model."""
        graph = self.ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self._tape.nodes,
            initializers=self._tape.initializers,
            opset_imports=dict(opsets),
            name="decoder",
        )
        # Known once the bytes have a place: `share_aliases` reads it then.
        graph.meta[_ALIASES] = self._aliases
        return self.ir.Model(
            graph, ir_version=ir_version, producer_name="spp", metadata_props=dict(metadata)
        )

    def _type(self, dtype: str) -> Any:
        return self.ir.DataType[dtype] if dtype else self.dtype

    def _value(self, name: str, dtype: Any, shape: Sequence[Dimension] | None) -> Any:
        return self.ir.Value(
            name=name,
            type=self.ir.TensorType(dtype),
            shape=None if shape is None else self.ir.Shape(shape),
        )


def aliases(model: ir.Model) -> Sequence[tuple[Any, Any]]:
    """A recorded model's aliases (ir.Value), each with the initialiser whose bytes it shows."""
    pairs: Sequence[tuple[Any, Any]] = model.graph.meta[_ALIASES]
    return pairs


def share_aliases(model: ir.Model, directory: Path) -> None:
    """Give a model's aliases their bytes, after its initialisers went to files in `directory`."""
    ir = require("onnx_ir")
    for value, of in aliases(model):
        stored = of.const_value
        if isinstance(stored, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                stored.location,
                stored.offset,
                stored.length,
                stored.dtype,
                name=value.name,
                shape=value.shape,
                base_dir=directory,
            )
        else:
            array = stored.numpy().reshape(value.shape.numpy())
            value.const_value = ir.Tensor(array, dtype=stored.dtype, name=value.name)
        model.graph.register_initializer(value)

"""The tensors of an MLP with experts, by the part that each plays, and as a graph holds them.

A graph has an expert's gate and up in one matrix [2F, d], all gates and then all ups; where all
experts of a layer are in one tensor [E, 2F, d], gate and up of each channel lie side by side, as
ONNX Runtime's operator reads them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from spp_export.formats.onnx.options import Precision
from spp_export.formats.onnx.weights import Array, rows
from spp_export.models.checkpoint.header import StoredTensor
from spp_export.models.families import Family
from spp_export.models.families.experts import Experts
from spp_export.models.shape import ExpertTensor

# What some routers add to the scores by which experts are chosen, and not to their weights.
_CORRECTION = "e_score_correction_bias"
# Products of a graph, and what of the experts they have.
ENTERS, LEAVES = "gate_up", "down"


@dataclass(frozen=True)
class MlpParts:
    """What a layer with experts has in the place of an MLP.

    router      module whose outputs count experts
    correction  what is added to their scores; "" is nothing
    beside      modules of gate, up and down of an MLP that every token sees; empty is none
    beside_gate module of the factor of what that MLP writes; "" is none
    routed      tensors of experts: of `ENTERS` and `LEAVES`, each with "weight" or "bias"
    """

    router: str
    correction: str
    beside: tuple[str, ...]
    beside_gate: str
    routed: Mapping[tuple[str, str], tuple[ExpertTensor, ...]]

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules that are products of their own."""
        return tuple(filter(None, (self.router, *self.beside, self.beside_gate)))

    def place_of(self, name: str) -> Place | None:
        """Where a graph has the tensor of experts of this name; None where it is none."""
        for (product, kind), tensors in self.routed.items():
            for tensor in tensors:
                before, star, after = tensor.name.partition("*")
                number = name.removeprefix(before).removesuffix(after) if star else ""
                if name == f"{before}{number}{after}" and number.isdigit() == bool(star):
                    return Place(product, kind, number, tensor)
        return None


@dataclass(frozen=True)
class Place:
    """Where a graph has a tensor of experts: in which product, as "weight" or "bias", and of which
    expert, by its number, "" where it is of all."""

    product: str
    kind: str
    number: str
    tensor: ExpertTensor


def mlp_parts(experts: Experts, tensors: Sequence[ExpertTensor]) -> MlpParts:
    """The parts of a layer with these tensors."""
    routed: dict[tuple[str, str], tuple[ExpertTensor, ...]] = {}
    router = correction = ""
    beside: dict[str, None] = {}
    for tensor in tensors:
        module, _, last = tensor.name.rpartition(".")
        if tensor.routed:
            kind = "weight" if len(tensor.shape) - (0 if tensor.each else 1) == 2 else "bias"
            leaves = experts.is_down(tensor) or tensor.wide is None
            part = LEAVES if leaves else ENTERS, kind
            routed[part] = (*routed.get(part, ()), tensor)
        elif last == _CORRECTION:
            correction = tensor.name
        elif tensor.axis is not None:
            router = module
        else:
            beside[module] = None
    # Gate, up and down are in a module of theirs.
    places = Counter(module.rpartition(".")[0] for module in beside)
    alone = [module for module in beside if places[module.rpartition(".")[0]] == 1]
    mlp = tuple(module for module in beside if module not in alone)
    return MlpParts(router, correction, mlp, "".join(alone), routed)


class ExpertReader:
    """Reads the experts of one layer of a checkpoint, in `precision`."""

    def __init__(
        self,
        family: Family,
        tensors: Mapping[str, StoredTensor],
        layer: int,
        parts: MlpParts,
        precision: Precision,
    ) -> None:
        self._family, self._tensors, self._layer = family, tensors, layer
        self._parts, self._precision = parts, precision

    def one(self, product: str, kind: str, expert: int) -> Array:
        """An expert's weight [outputs, inputs] or bias [outputs] in a product."""
        tensors = self._parts.routed[product, kind]
        return np.concatenate(
            [_outputs(self._read(tensor, expert), tensor, product) for tensor in tensors]
        )

    def turned(self, product: str, expert: int) -> Callable[[], Array]:
        """Of a weight [inputs, outputs]."""
        return lambda: np.ascontiguousarray(self.one(product, "weight", expert).T)

    def all(self, product: str, kind: str, count: int, *, paired: bool) -> Callable[[], Array]:
        """Of all experts one after the other; `paired`: gate and up of each channel side by
        side."""

        def read() -> Array:
            every = (self.one(product, kind, expert) for expert in range(count))
            beside = paired and product == ENTERS
            return np.stack([side_by_side(one) if beside else one for one in every])

        return read

    def _read(self, tensor: ExpertTensor, expert: int) -> Array:
        name = self._family.layer_name(self._layer, tensor.name.replace("*", str(expert)))
        stored = self._tensors[name]
        if not tensor.each:  # it is the first axis that counts experts
            size = stored.nbytes // stored.shape[0]
            place = stored.offset + expert * size
            stored = replace(stored, shape=stored.shape[1:], offset=place, nbytes=size)
        return rows(stored, self._precision)


def _outputs(values: Array, tensor: ExpertTensor, product: str) -> Array:
    """An expert's weight or bias as stored, its outputs first, and all gates before all ups."""
    outputs = values.T if _turned(tensor, product) else values
    return apart(outputs) if tensor.form == "[CC]" and product == ENTERS else outputs


def as_stored(
    values: Array, tensors: Sequence[ExpertTensor], tensor: ExpertTensor, product: str
) -> Array:
    """What one of a product's `tensors` has of an expert, of all that `ExpertReader.one` gives."""
    size = len(values) // len(tensors)
    first = tensors.index(tensor) * size
    outputs = values[first : first + size]
    if tensor.form == "[CC]" and product == ENTERS:
        outputs = side_by_side(outputs)
    return outputs.T if _turned(tensor, product) else outputs


def _turned(tensor: ExpertTensor, product: str) -> bool:
    """Whether the weight of an expert is stored with its inputs first; channels are the outputs of
    what enters, and the inputs of what leaves."""
    axis = 0 if tensor.each else 1
    if len(tensor.shape) - axis != 2:
        return False
    return (tensor.wide == axis) != (product == ENTERS)


def side_by_side(values: Array) -> Array:
    """Gates and ups channel by channel, of all gates and then all ups."""
    half = len(values) // 2
    result = np.empty_like(values)
    result[::2], result[1::2] = values[:half], values[half:]
    return result


def apart(values: Array) -> Array:
    """The inverse of `side_by_side`."""
    return np.concatenate([values[::2], values[1::2]])

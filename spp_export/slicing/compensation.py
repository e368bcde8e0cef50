"""The compensated consumers of a plan, o_proj and down_proj, made as the slicer asks for them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spp_export.calibration.moments import Moments
from spp_export.calibration.refit import bias, refit_blocks, residual_blocks
from spp_export.domains.diagnosis import FloatArray
from spp_export.models.checkpoint.reader import read_float, stored_tensors
from spp_export.models.checkpoint.source import Source
from spp_export.models.families import Role, TensorSpec
from spp_export.models.shape import ModelShape
from spp_export.planning import Compensation as Kind
from spp_export.planning import LayerPlan, Layout, Plan
from spp_export.slicing.config import slim_config
from spp_export.slicing.cut import kept_indices, real_elements
from spp_export.slicing.weights import Refit, slim_shape

if TYPE_CHECKING:
    from spp_export.evaluation.oracle import Projection

# lambda as a share of the mean variance of the kept inputs: small against what text determines,
# large against directions that the calibration text never excites.
RIDGE = 0.01

CONSUMERS = (Role.OUTPUT, Role.DOWN)
Indices = np.ndarray[Any, np.dtype[np.intp]]


def loses(layer: LayerPlan, role: Role, shape: ModelShape) -> bool:
    """Whether a layer's o_proj (OUTPUT) or down_proj (DOWN) loses inputs."""
    kept = layer.shape(shape)
    if role is Role.OUTPUT:
        return kept.query_heads < shape.query_heads
    return role is Role.DOWN and kept.channels < shape.channels


def losing_roles(layers: Iterable[LayerPlan], shape: ModelShape) -> frozenset[Role]:
    """The consumers that lose inputs in some layer."""
    return frozenset(role for layer in layers for role in CONSUMERS if loses(layer, role, shape))


def biased_roles(compiled: Plan, shape: ModelShape) -> frozenset[Role]:
    """The consumers that a plan's compensation adds biases to, in every layer."""
    if compiled.compensation != "bias":
        return frozenset()
    return losing_roles(compiled.layers, shape)


def compensated_shape(
    source: Source, layout: Layout, compensation: Kind, losing: Collection[Role]
) -> ModelShape:
    """The source's shape with the biases that a compensation adds where the consumers `losing`
    (OUTPUT, DOWN) lose inputs.

    Raises PlanError for `bias` where the layout cannot hold one in this family.
    """
    return slim_shape(source, layout, losing if compensation == "bias" else ())


def written_shape(source: Source, compiled: Plan) -> ModelShape:
    """`compensated_shape` of a plan."""
    return slim_shape(source, compiled.layout, biased_roles(compiled, source.shape))


def written_config(source: Source, compiled: Plan) -> dict[str, Any]:
    """config.json of the slim checkpoint that a plan makes of the source."""
    return slim_config(
        source.config,
        source.family,
        source.shape,
        compiled.written_shapes(source.shape),
        compiled.written_layout,
        biased_roles(compiled, source.shape),
    )


def moment_kinds(compiled: Plan, shape: ModelShape) -> tuple[str, ...]:
    """Kinds of statistics, see `moments.gather`, that a plan's compensation reads."""
    kinds = {Role.OUTPUT: "attention", Role.DOWN: "mlp"}
    return tuple(sorted(kinds[role] for role in losing_roles(compiled.layers, shape)))


def real_columns(compiled: Plan, layer: int, role: Role, shape: ModelShape) -> Indices | slice:
    """Columns of a consumer's weight, as it is written, that are not padding."""
    if not compiled.padded or role is not Role.OUTPUT:
        return slice(None)
    return real_elements(compiled.layers[layer].padded_heads(shape.group_size), shape.head_dim)


class Compensation:
    """What the slicer needs: a re-fit per consumer that loses inputs, and biases to add."""

    def __init__(self, source: Source, compiled: Plan, moments: Moments | None) -> None:
        self._source = source
        self._plan = compiled
        self._moments = moments

    def refit(self, spec: TensorSpec) -> Refit | None:
        """How the slicer replaces a tensor: only consumers' weights that lose columns, by lstsq."""
        if self._plan.compensation != "lstsq" or not self._loses(spec):
            return None
        blocks, kept = self._blocks(spec), self._kept(spec)
        return lambda weight: refit_blocks(weight, blocks, kept, RIDGE)

    def biases(self) -> Mapping[tuple[int, Role], FloatArray]:
        """The mean write of what was removed, per layer and consumer that loses some, for `bias`.

        From FLAP, see `compensate.bias`.
        """
        if self._plan.compensation != "bias":
            return {}
        result = {}
        for spec in self._losing():
            assert spec.layer is not None
            weight = read_float(self._source.tensors[spec.name])
            removed = np.setdiff1d(np.arange(weight.shape[1]), self._kept(spec))
            result[spec.layer, spec.role] = bias(weight, self._mean(spec), removed)
        return result

    def projections(self) -> dict[tuple[int, Role], Projection]:
        """What `masked_dense` puts in place of the consumers that lose inputs, in float32.

        For measuring a plan without writing it.
        """
        import torch

        from spp_export.evaluation.oracle import Projection

        tensors, biases = self._source.tensors, self.biases()
        found = {}
        for spec in self._losing() if self._plan.compensation != "none" else ():
            assert spec.layer is not None
            weight = read_float(tensors[spec.name])
            refit = self.refit(spec)
            kept = weight[:, self._kept(spec)] if refit is None else refit(weight)
            added = biases.get((spec.layer, spec.role))
            stored = tensors.get(f"{spec.name.removesuffix('.weight')}.bias")
            if added is not None and stored is not None:
                added = added + read_float(stored)
            found[spec.layer, spec.role] = Projection(
                torch.from_numpy(kept).float(),
                None if added is None else torch.from_numpy(added).float(),
            )
        return found

    def lost(self, directory: Path) -> Iterator[tuple[float, float]]:
        """Per re-fitted consumer, the share of its output's energy that is lost on the moments: as
        written in `directory`, and as the plain slice would lose it. Yields nothing but for lstsq.
        """
        if self._plan.compensation != "lstsq":
            return
        stored = stored_tensors(directory)
        for spec in self._losing():
            weight = read_float(self._source.tensors[spec.name])
            blocks, kept = self._blocks(spec), self._kept(spec)
            assert spec.layer is not None
            real = real_columns(self._plan, spec.layer, spec.role, self._source.shape)
            found = read_float(stored[spec.name])[:, real]
            written = residual_blocks(weight, blocks, kept, found)
            yield written, residual_blocks(weight, blocks, kept, weight[:, kept])

    def _losing(self) -> Iterator[TensorSpec]:
        shape = self._source.shape
        specs = self._source.family.tensors(shape, shape.layers)
        return (spec for spec in specs if self._loses(spec))

    def _loses(self, spec: TensorSpec) -> bool:
        if spec.layer is None or spec.role not in CONSUMERS:
            return False
        return loses(self._plan.layers[spec.layer], spec.role, self._source.shape)

    def _blocks(self, spec: TensorSpec) -> FloatArray:
        """Second moments [n,b,b] of the input of a consumer: of o_proj's in one block."""
        assert spec.layer is not None
        assert self._moments is not None
        if spec.role is Role.DOWN:
            return self._moments.channel_blocks(spec.layer)
        return self._moments.second(spec.layer)[None]

    def _mean(self, spec: TensorSpec) -> FloatArray:
        assert spec.layer is not None
        assert self._moments is not None
        if spec.role is Role.DOWN:
            return self._moments.channel_mean(spec.layer)
        return self._moments.mean(spec.layer)

    def _kept(self, spec: TensorSpec) -> Indices:
        """Elements of a losing consumer's input that stay."""
        assert spec.layer is not None
        layer = self._plan.layers[spec.layer]
        if spec.role is Role.DOWN:
            return np.asarray(layer.channels)
        return kept_indices(layer.query_heads, self._source.shape.head_dim)

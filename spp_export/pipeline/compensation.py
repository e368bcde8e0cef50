"""The compensated output projections of a plan, made as the slicer asks for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spp_export.checkpoint.reader import read_float, stored_tensors
from spp_export.checkpoint.slim import Refit, slim_shape
from spp_export.checkpoint.source import Source
from spp_export.compensate import bias, refit, residual
from spp_export.diagnosis import FloatArray
from spp_export.families import Role, TensorSpec
from spp_export.moments import Moments
from spp_export.plans import Plan
from spp_export.shape import ModelShape
from spp_export.slicing import kept_indices

# lambda as a share of the mean variance of the kept inputs: small against what text determines,
# large against directions that the calibration text never excites.
RIDGE = 0.01


def compensated_shape(source: Source, compensation: str) -> ModelShape:
    """The source's shape with the biases that a compensation adds to what is written.

    Raises PlanError for `bias` in a family whose o_proj cannot have one.
    """
    return slim_shape(source, {Role.OUTPUT} if compensation == "bias" else set())


class Compensation:
    """What the slicer needs: a re-fit per o_proj weight, and biases to add."""

    def __init__(self, source: Source, compiled: Plan, moments: Moments | None) -> None:
        self._source = source
        self._plan = compiled
        self._moments = moments

    def refit(self, spec: TensorSpec) -> Refit | None:
        """How the slicer replaces a tensor: only o_proj weights that lose columns, by lstsq."""
        if not self._is_refitted(spec):
            return None
        second, kept = self._fitted_to(spec)
        return lambda weight: refit(weight, second, kept, RIDGE)

    def biases(self) -> Mapping[tuple[int, Role], FloatArray]:
        """The mean write of what was removed, per layer, for `bias`."""
        if self._plan.compensation != "bias":
            return {}
        assert self._moments is not None
        family = self._source.family
        result = {}
        for layer in range(self._source.shape.num_layers):
            name = f"{family.layer_name(layer, family.output)}.weight"
            weight = read_float(self._source.tensors[name])
            removed = np.setdiff1d(np.arange(weight.shape[1]), self._kept(layer))
            result[layer, Role.OUTPUT] = bias(weight, self._moments.mean(layer), removed)
        return result

    def lost(self, directory: Path) -> Iterator[tuple[float, float]]:
        """Per re-fitted layer, the share of its output's energy that is lost on the moments: as
        written in `directory`, and as the plain slice would lose it. Yields nothing but for lstsq.
        """
        stored = stored_tensors(directory)
        family = self._source.family
        for spec in family.tensors(self._source.shape, self._source.shape.layers):
            if not self._is_refitted(spec):
                continue
            weight = read_float(self._source.tensors[spec.name])
            second, kept = self._fitted_to(spec)
            written = residual(weight, second, kept, read_float(stored[spec.name]))
            yield written, residual(weight, second, kept, weight[:, kept])

    def _is_refitted(self, spec: TensorSpec) -> bool:
        if self._plan.compensation != "lstsq" or spec.role is not Role.OUTPUT:
            return False
        assert spec.layer is not None
        return len(self._plan.layers[spec.layer].query_heads) < self._source.shape.query_heads

    def _fitted_to(self, spec: TensorSpec) -> tuple[FloatArray, np.ndarray[Any, np.dtype[np.intp]]]:
        """Moments of the input of a re-fitted projection, and the elements of it that stay."""
        assert spec.layer is not None
        assert self._moments is not None
        return self._moments.second(spec.layer), self._kept(spec.layer)

    def _kept(self, layer: int) -> np.ndarray[Any, np.dtype[np.intp]]:
        heads = self._plan.layers[layer].query_heads
        return np.asarray(kept_indices(heads, self._source.shape.head_dim))

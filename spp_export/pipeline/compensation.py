"""The compensated output projections of a plan, made as the slicer asks for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from spp_export.artifacts import Artifacts
from spp_export.checkpoint.reader import read_float
from spp_export.checkpoint.slim import Refit, slim_shape
from spp_export.compensate import bias, refit
from spp_export.diagnosis import FloatArray
from spp_export.errors import UsageError
from spp_export.families import Role, TensorSpec
from spp_export.moments import Moments, load_or_gather
from spp_export.plans import Plan
from spp_export.session import Session
from spp_export.slicing import kept_indices

# Weight of the scenario's own tokens against the pools' in the moments. The pools are tens of
# thousands of tokens and keep the fit from chasing a scenario of two thousand.
SCENARIO_WEIGHT = 0.3
# lambda as a share of the mean variance of the kept inputs: small against what text determines,
# large against directions that the calibration text never excites.
RIDGE = 0.01


class Compensation:
    """What the slicer needs: a re-fit per o_proj weight, and biases to add."""

    def __init__(
        self,
        session: Session,
        compiled: Plan,
        artifacts: Artifacts | None,
        scenario_prompts: Sequence[str],
    ) -> None:
        self._session = session
        self._plan = compiled
        self._kind = compiled.compensation
        if self._kind == "bias":
            slim_shape(session.source, {Role.OUTPUT})  # PlanError where the family has no place
        self._moments = (
            None if self._kind == "none" else _gather(session, artifacts, scenario_prompts)
        )

    def refit(self, spec: TensorSpec) -> Refit | None:
        """How the slicer replaces a tensor: only o_proj weights that lose columns, by lstsq."""
        if self._kind != "lstsq" or spec.role is not Role.OUTPUT or spec.layer is None:
            return None
        kept = self._kept(spec.layer)
        if len(kept) == spec.shape[1]:
            return None
        assert self._moments is not None
        second = self._moments.second[spec.layer]
        return lambda weight: refit(weight, second, kept, RIDGE)

    @property
    def biases(self) -> Mapping[tuple[int, Role], FloatArray]:
        """The mean write of what was removed, per layer, for `bias`."""
        if self._kind != "bias":
            return {}
        assert self._moments is not None
        source = self._session.source
        result = {}
        for layer in range(source.shape.num_layers):
            name = f"{source.family.layer_name(layer, source.family.output)}.weight"
            weight = read_float(source.tensors[name])
            removed = np.setdiff1d(np.arange(weight.shape[1]), self._kept(layer))
            result[layer, Role.OUTPUT] = bias(weight, self._moments.mean[layer], removed)
        return result

    def _kept(self, layer: int) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
        heads = self._plan.layers[layer].query_heads
        return np.asarray(kept_indices(heads, self._session.source.shape.head_dim))


def _gather(
    session: Session, artifacts: Artifacts | None, scenario_prompts: Sequence[str]
) -> Moments:
    """Moments of the artifacts' calibration text and of the scenario's own."""
    texts = [text for _, text in artifacts.calibration] if artifacts else []
    parts = []
    for what, some in (("pools", texts), ("scenario", list(scenario_prompts))):
        if some:
            parts.append(
                load_or_gather(
                    session.source,
                    some,
                    lambda: (session.model, session.tokenizer),
                    progress=session.progress,
                    description=f"gathering moments of the {what}",
                )
            )
    if not parts:
        raise UsageError(
            "compensation needs text: give --scenario or --artifacts, or --compensate none."
        )
    return parts[0] if len(parts) == 1 else parts[0].mixed_with(parts[1], SCENARIO_WEIGHT)

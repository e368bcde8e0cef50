"""The compensated consumers of a plan, o_proj and down_proj, made as the slicer asks for them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np

from spp_export.calibration.answers import Answering, scenario_traffic
from spp_export.calibration.mixture import Mixing, WeightedTexts, calibration_parts, gather_parts
from spp_export.calibration.moments import Moments
from spp_export.calibration.reading import TokenText
from spp_export.calibration.refit import bias, refit, refit_blocks, residual, residual_blocks
from spp_export.calibration.whole import MOMENTS, WholeMoments, passes
from spp_export.common.arrays import FloatArray
from spp_export.common.errors import PlanError
from spp_export.common.options import WINDOW
from spp_export.data.artifacts import Artifacts
from spp_export.data.scenario import Scenario
from spp_export.models.checkpoint.checkpoint import Checkpoint, outputs_first, written_tensors
from spp_export.models.checkpoint.dtypes import as_stored
from spp_export.models.checkpoint.reader import read_float
from spp_export.models.families import Role, TensorSpec
from spp_export.models.products import Matmul
from spp_export.models.session import Session
from spp_export.models.shape import ModelShape
from spp_export.planning import Plan
from spp_export.planning.planner import requested_mixing
from spp_export.planning.request import PlanRequest
from spp_export.planning.written import (
    CONSUMERS,
    biased_roles,
    layers_losing,
    loses,
    moment_kinds,
)
from spp_export.slicing.config import slim_config
from spp_export.slicing.cut import kept_indices, real_elements
from spp_export.slicing.weights import Refit

if TYPE_CHECKING:
    from spp_export.slicing.projections import Projection

# lambda as a share of the mean variance of the kept inputs: small against what text determines,
# large against directions that the calibration text never excites.
RIDGE = 0.01

Indices = np.ndarray[Any, np.dtype[np.intp]]
_log = logging.getLogger(__name__)


def written_config(source: Checkpoint, compiled: Plan) -> dict[str, Any]:
    """config.json of the slim checkpoint that a plan makes of the source."""
    return slim_config(
        source.config,
        source.family,
        source.shape,
        compiled.written_shapes(source.shape),
        compiled.written_layout,
        biased_roles(compiled, source.shape),
        [layer.query_heads for layer in compiled.layers],
    )


def real_columns(compiled: Plan, layer: int, role: Role, shape: ModelShape) -> Indices | slice:
    """Columns of a consumer's weight, as it is written, that are not padding."""
    if not compiled.padded or role is not Role.OUTPUT:
        return slice(None)
    return real_elements(compiled.layers[layer].padded_heads(shape.group_size), shape.head_dim)


class Compensator:
    """What the slicer needs: a re-fit per consumer that loses inputs, and biases to add."""

    def __init__(
        self,
        source: Checkpoint,
        compiled: Plan,
        moments: Moments | None,
        whole: WholeMoments | None = None,
    ) -> None:
        self._source = source
        self._plan = compiled
        self._moments = moments
        self._whole = whole
        # By tensor, of those that were re-fitted on whole moments, which are not kept.
        self._lost: dict[str, tuple[float, float]] = {}

    def refit(self, spec: TensorSpec) -> Refit | None:
        """How the slicer replaces a tensor: only consumers' weights that lose columns, by lstsq."""
        if self._plan.compensation != "lstsq" or not self._loses(spec):
            return None
        if not self._kept(spec).size:
            return None  # nothing is left to re-fit
        if self._whole is not None and spec.role is Role.DOWN:
            return partial(self._refit_whole, self._whole, spec)
        blocks, kept = self._blocks(spec), self._kept(spec)
        return lambda weight: refit_blocks(weight, blocks, kept, RIDGE)

    def _refit_whole(self, whole: WholeMoments, spec: TensorSpec, weight: FloatArray) -> FloatArray:
        assert spec.layer is not None
        moments, kept = whole.take(spec.layer), self._kept(spec)
        refitted = refit(weight, moments, kept, RIDGE)
        self._lost[spec.name] = (
            residual(weight, moments, kept, refitted),
            residual(weight, moments, kept, weight[:, kept]),
        )
        return refitted

    def biases(self) -> Mapping[tuple[int, Role], FloatArray]:
        """The mean write of what was removed, per layer and consumer that loses some, for `bias`.

        From FLAP, see `refit.bias`.
        """
        if self._plan.compensation != "bias":
            return {}
        result = {}
        for spec in self._losing():
            assert spec.layer is not None
            weight = self._weight(spec)
            removed = np.setdiff1d(np.arange(weight.shape[1]), self._kept(spec))
            result[spec.layer, spec.role] = bias(weight, self._mean(spec), removed)
        return result

    def projections(self) -> dict[tuple[int, Role], Projection]:
        """What `masked_dense` puts in place of the consumers that lose inputs, in float32, rounded
        as they would be stored.

        For measuring a plan without writing it.
        """
        import torch

        from spp_export.slicing.projections import Projection

        tensors, biases = self._source.tensors, self.biases()
        projections = {}
        for spec in self._losing() if self._plan.compensation != "none" else ():
            assert spec.layer is not None
            weight = self._weight(spec)
            refit = self.refit(spec)
            kept = weight[:, self._kept(spec)] if refit is None else refit(weight)
            added = biases.get((spec.layer, spec.role))
            stored = tensors.get(f"{spec.name.removesuffix('.weight')}.bias")
            if added is not None and stored is not None:
                added = added + read_float(stored)
            dtype = tensors[spec.name].dtype
            projections[spec.layer, spec.role] = Projection(
                torch.from_numpy(as_stored(kept, dtype)).float(),
                None if added is None else torch.from_numpy(as_stored(added, dtype)).float(),
            )
        return projections

    def lost(self, directory: Path) -> Iterator[tuple[float, float]]:
        """Per re-fitted consumer, the share of its output's energy that is lost on the moments: as
        written in `directory`, and as the plain slice would lose it. Yields nothing but for lstsq.

        Of one that was re-fitted on whole moments it is that of the re-fit, before it was rounded.
        """
        if self._plan.compensation != "lstsq":
            return
        stored = written_tensors(directory, self._source.family)
        for spec in self._losing():
            if not self._kept(spec).size:
                continue
            if spec.name in self._lost:
                yield self._lost[spec.name]
                continue
            weight = self._weight(spec)
            blocks, kept = self._blocks(spec), self._kept(spec)
            assert spec.layer is not None
            real = real_columns(self._plan, spec.layer, spec.role, self._source.shape)
            written = outputs_first(self._source.family, read_float(stored[spec.name]))[:, real]
            yield (
                residual_blocks(weight, blocks, kept, written),
                residual_blocks(weight, blocks, kept, weight[:, kept]),
            )

    def _losing(self) -> Iterator[TensorSpec]:
        shape = self._source.shape
        specs = self._source.family.tensors(shape, shape.layers)
        return (spec for spec in specs if self._loses(spec))

    def _loses(self, spec: TensorSpec) -> bool:
        if spec.layer is None or spec.role not in CONSUMERS:
            return False
        return loses(self._plan.layers[spec.layer], spec.role, self._source.shape)

    def _weight(self, spec: TensorSpec) -> FloatArray:
        """The dense weight [outputs, inputs] of a consumer."""
        assert spec.layer is not None
        weight: FloatArray = self._source.weight(
            self._source.family.projection(spec.role), spec.layer
        )
        return weight

    def _blocks(self, spec: TensorSpec) -> FloatArray:
        """Second moments [n,b,b] of the input of a consumer: of o_proj's in one block."""
        assert spec.layer is not None
        assert self._moments is not None
        return self._moments.blocks(CONSUMERS[spec.role], spec.layer)

    def _mean(self, spec: TensorSpec) -> FloatArray:
        assert spec.layer is not None
        assert self._moments is not None
        return self._moments.mean(CONSUMERS[spec.role], spec.layer)

    def _kept(self, spec: TensorSpec) -> Indices:
        """Elements of a losing consumer's input that stay."""
        assert spec.layer is not None
        layer = self._plan.layers[spec.layer]
        if spec.role is Role.DOWN:
            return kept_indices(layer.channels or (), 1)
        return kept_indices(layer.query_heads, self._source.shape.head_dim)


def plan_compensation(
    session: Session,
    artifacts: Artifacts | None,
    compiled: Plan,
    scenario: Scenario | None,
    request: PlanRequest,
    *,
    blocks: bool = False,
) -> Compensator:
    """The re-fit or the biases of a plan, on the text that its provenance names.

    Statistics of text that were not gathered before take a pass of the dense model, and so do the
    moments of all channels of a wide MLP, where the plan asks for them: not with `blocks`, for one
    of many plans that are tried. Raises UsageError where there is no text at all, PlanError for a
    malformed mixture.
    """
    if compiled.compensation == "none":
        return Compensator(session.source, compiled, None)
    limit = calibration_tokens(compiled, request)
    answering = plan_answering(compiled, request)
    texts: tuple[TokenText, ...] = ()
    if scenario:
        traffic = scenario_traffic(session, scenario, limit, answering)
        texts = traffic.calibration.texts
    mixing = plan_mixing(compiled) or requested_mixing(artifacts, request)
    mixture = compiled.diagnosis.get("mixture")
    answered = answering.tokens > 0
    parts = calibration_parts(artifacts, mixture, texts, mixing, answered=answered)
    moments = gather_parts(session, parts, moment_kinds(compiled, session.source.shape))
    whole = None if blocks else _whole_moments(session, compiled, parts)
    return Compensator(session.source, compiled, moments, whole)


def _whole_moments(
    session: Session, compiled: Plan, parts: Sequence[WeightedTexts]
) -> WholeMoments | None:
    """What the plan asks for; the first of them are gathered here."""
    asked: Any = compiled.calibration.get("moments", "blocks")
    if asked not in MOMENTS:
        raise PlanError(
            f"plan: calibration.moments must be one of {', '.join(MOMENTS)}, got {asked!r:.40}. "
            "Leave it out for blocks."
        )
    layers = layers_losing(compiled.layers, Role.DOWN, session.source.shape)
    if asked == "blocks" or compiled.compensation != "lstsq" or not layers:
        return None
    if not passes(session, len(layers)):
        _log.warning(
            "the plan was made for re-fitting on the moments of all channels together, which this "
            "machine's free memory does not hold: they are taken in blocks, and the weights differ."
        )
        return None
    whole = WholeMoments(session, parts, layers)
    whole.gather()
    return whole


def plan_mixing(compiled: Plan) -> Mixing | None:
    """How the text that decided the plan was mixed, if the plan says so."""
    if "shrinkage" not in compiled.calibration and "scenario_weight" not in compiled.calibration:
        return None
    values: list[float] = []
    for key in ("shrinkage", "scenario_weight"):
        value: Any = compiled.calibration.get(key)
        # A plan's provenance may be edited by hand like the rest of it.
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise PlanError(
                f"plan: calibration.{key} must be a number from 0 to 1, got {value!r:.40}. "
                "Leave out calibration for the usual mixture."
            )
        values.append(float(value))
    return Mixing(*values)


def calibration_tokens(compiled: Plan, request: PlanRequest) -> int:
    """How much of a scenario's text is read: as much as when the plan was made, if it says so."""
    return _recorded(compiled, "calibration_tokens", request.calibration_tokens, WINDOW)


def warn_of_other_answers(compiled: Plan, scenario: Scenario | None) -> None:
    """Say so where a plan was made with answers of a file, and a scenario comes without them."""
    known: Any = compiled.scenario.get("answers")
    if known and scenario and not scenario.answers:
        _log.warning(
            "the plan was made with the answers in %.60s, and the dense model answers now. Give "
            "the same answers.",
            known.get("name") if isinstance(known, dict) else known,
        )


def plan_answering(compiled: Plan, request: PlanRequest) -> Answering:
    """How prompts are answered: as when the plan was made, if it says so."""
    usual = request.answering
    return Answering(
        _recorded(compiled, "answer_tokens", usual.tokens, 0),
        _recorded(compiled, "answer_seed", usual.seed, 0),
    )


def plan_matmul(compiled: Plan) -> Matmul:
    """Precision of products when the plan was made: float32 where it does not say."""
    value: Any = compiled.calibration.get("matmul", "float32")
    if value not in get_args(Matmul):
        raise PlanError(
            f"plan: calibration.matmul must be one of {', '.join(get_args(Matmul))}, got "
            f"{value!r:.40}. Leave it out for float32."
        )
    return cast("Matmul", value)


def _recorded(compiled: Plan, key: str, usual: int, least: int) -> int:
    value: Any = compiled.calibration.get(key, usual)
    if type(value) is not int or value < least:
        raise PlanError(
            f"plan: calibration.{key} must be an integer from {least} on, got {value!r:.40}. "
            "Leave it out for the usual number."
        )
    return value

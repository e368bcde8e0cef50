"""What a plan's compensation is computed from, for whoever builds the slim weights."""

from __future__ import annotations

from typing import Any

from spp_export.calibration.mixture import Mixing, calibration_parts, gather_parts
from spp_export.commands.plan import PlanRequest, requested_mixing
from spp_export.common.errors import PlanError
from spp_export.data.artifacts import Artifacts
from spp_export.data.scenario import Scenario
from spp_export.models.session import Session
from spp_export.planning import Plan
from spp_export.slicing.compensation import Compensation, moment_kinds


def plan_compensation(
    session: Session,
    artifacts: Artifacts | None,
    compiled: Plan,
    scenario: Scenario | None,
    request: PlanRequest,
) -> Compensation:
    """The re-fit or the biases of a plan, on the text that its provenance names.

    Statistics of text that were not gathered before take a pass of the dense model. Raises
    UsageError where there is no text at all, PlanError for a malformed mixture.
    """
    if compiled.compensation == "none":
        return Compensation(session.source, compiled, None)
    prompts = scenario.split()[0] if scenario else ()
    mixing = _mixing(compiled) or requested_mixing(artifacts, request)
    parts = calibration_parts(artifacts, compiled.diagnosis.get("mixture"), prompts, mixing)
    moments = gather_parts(session, parts, moment_kinds(compiled, session.source.shape))
    return Compensation(session.source, compiled, moments)


def _mixing(compiled: Plan) -> Mixing | None:
    """How the text that decided the plan was mixed, if the plan says so."""
    if not compiled.calibration:
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

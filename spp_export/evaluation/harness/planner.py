"""Rows of an evaluation to what they keep, by the same steps as an export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from spp_export.calibration.mixture import (
    Mixing,
    WeightedTexts,
    calibration_parts,
    gather_parts,
)
from spp_export.common.errors import UsageError
from spp_export.data.artifacts import Artifacts
from spp_export.data.scenario import Scenario
from spp_export.domains.diagnosis import diagnose_prompts
from spp_export.evaluation.harness.rows import PlannedRow, Row, Text
from spp_export.models.session import Session
from spp_export.models.shape import unit_parameters
from spp_export.planning import LayerPlan, Plan, compile_units, dense_plan
from spp_export.planning.budget import Budget
from spp_export.planning.planner import requested_mixing, scoring_for
from spp_export.planning.request import PlanRequest
from spp_export.planning.scoring import SEQUENTIAL, UnitOptions
from spp_export.planning.written import moment_kinds
from spp_export.slicing.compensation import Compensator

# Enough for every way of choosing in a grid, which goes budget by budget and asks for each again.
_REMEMBERED = 64


@dataclass
class Planner:
    """Plans rows for a scenario. What rows share, such as scores and mixtures, is made once.

    wrong: another scenario, for the control of that name. others: artifacts by the name that rows
    give them.
    """

    session: Session
    artifacts: Artifacts
    scenario: Scenario
    wrong: Scenario | None = None
    others: Mapping[str, Artifacts] = field(default_factory=dict)
    _parts: dict[tuple[str, Text], tuple[WeightedTexts, ...]] = field(default_factory=dict)
    _options: dict[Row, UnitOptions] = field(default_factory=dict)

    def plan(self, row: Row) -> PlannedRow:
        """Choose units for a row by its criterion, and re-fit what stays."""
        shape = self.session.source.shape
        options = self._scored(row)
        layers, realised = compile_units(
            options.heads, options.channels, shape, Budget(keep=row.keep, units=row.units)
        )
        return self._planned(row, layers, {"keep": realised.keep})

    def given(self, row: Row, plan: Plan) -> PlannedRow:
        """Take the units of a plan as they are, and re-fit as the plan says."""
        shape = self.session.source.shape
        share = unit_parameters(shape, plan.layer_shapes(shape), row.units)
        keep = share / unit_parameters(shape, shape.layers, row.units)
        return self._planned(
            replace(row, compensation=plan.compensation), plan.layers, {"keep": keep}
        )

    def _planned(
        self, row: Row, layers: tuple[LayerPlan, ...], realised: dict[str, Any]
    ) -> PlannedRow:
        source = self.session.source
        dense = dense_plan(source.shape, source.fingerprint, source.name)
        compiled = replace(dense, layers=layers, compensation=row.compensation)
        moments = None
        if row.compensation != "none":
            kinds = moment_kinds(compiled, source.shape)
            moments = gather_parts(self.session, self._speaking(row), kinds)
        shapes = compiled.layer_shapes(source.shape)
        realised |= {
            "parameters": source.shape.parameters(shapes),
            "kv_bytes_per_token": source.shape.kv_bytes_per_token(shapes),
            "channel_keep": unit_parameters(source.shape, shapes, "channels")
            / unit_parameters(source.shape, source.shape.layers, "channels"),
            "head_keep": unit_parameters(source.shape, shapes, "heads")
            / unit_parameters(source.shape, source.shape.layers, "heads"),
        }
        return PlannedRow(layers, realised, Compensator(source, compiled, moments).projections())

    def _scored(self, row: Row) -> UnitOptions:
        """Options are the same for all budgets, but for criteria that prune on their way."""
        same = replace(row, compensation="lstsq", kind="method")
        if row.criterion not in SEQUENTIAL:
            same = replace(same, keep=1.0)
        if same not in self._options:
            if len(self._options) >= _REMEMBERED:
                del self._options[next(iter(self._options))]
            request = PlanRequest(
                keep=row.keep,
                units=row.units,
                criterion=row.criterion,
                comparable=row.comparable,
                seed=row.seed,
            )
            request.check()
            scoring = scoring_for(
                self.session,
                self._of(row),
                self._speaking(row),
                request,
                whitelist=row.whitelist,
            )
            self._options[same] = scoring.options()
        return self._options[same]

    def _speaking(self, row: Row) -> tuple[WeightedTexts, ...]:
        key = (row.artifacts, row.text)
        if key not in self._parts:
            self._parts[key] = self._mixed(self._of(row), row.text)
        return self._parts[key]

    def _mixed(self, artifacts: Artifacts, text: Text) -> tuple[WeightedTexts, ...]:
        mixing = requested_mixing(artifacts, PlanRequest())
        if text == "mean":
            return calibration_parts(artifacts, None, (), mixing)
        prompts, _ = self._scenario(text).split()
        if text == "own":
            return (WeightedTexts(tuple(prompts), 1.0),)
        mixture = diagnose_prompts(self.session, artifacts, prompts).shares
        if text == "single":
            likeliest = max(mixture, key=lambda domain: mixture[domain])
            mixture = {domain: float(domain == likeliest) for domain in mixture}
            mixing = Mixing(0.0, mixing.scenario_weight)
        return calibration_parts(artifacts, mixture, prompts, mixing)

    def _scenario(self, text: Text) -> Scenario:
        if text != "wrong":
            return self.scenario
        if self.wrong is None:
            raise UsageError("a row of the wrong scenario needs one: give --wrong FILE.")
        return self.wrong

    def _of(self, row: Row) -> Artifacts:
        return self.others[row.artifacts] if row.artifacts else self.artifacts

"""Rows of an evaluation to models: planned by the same steps as an export, and masked dense."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from spp_export.calibration.answers import Answering, scenario_traffic
from spp_export.calibration.mixture import (
    Mixing,
    WeightedTexts,
    calibration_parts,
    gather_parts,
)
from spp_export.calibration.reading import scenario_text
from spp_export.common.errors import UsageError
from spp_export.common.options import DEFAULT_CALIBRATION_TOKENS
from spp_export.data.artifacts import Artifacts
from spp_export.data.scenario import Scenario
from spp_export.domains.diagnosis import diagnose_prompts
from spp_export.evaluation.harness.measure import Opened
from spp_export.evaluation.harness.rows import BASELINES, HALF, PlannedRow, Row, Text
from spp_export.evaluation.harness.runner import OpenedRow
from spp_export.evaluation.harness.yardsticks import Rounding, rounded_projections
from spp_export.evaluation.oracle import masked_dense
from spp_export.models.families import Role
from spp_export.models.session import Session
from spp_export.models.shape import Units, includes, kept_share
from spp_export.planning import LayerPlan, Plan, compile_units, dense_plan, read_plan, validate_plan
from spp_export.planning.budget import Budget
from spp_export.planning.planner import requested_mixing, scoring_for
from spp_export.planning.request import PlanRequest
from spp_export.planning.scoring import SEQUENTIAL, UnitOptions
from spp_export.planning.written import loses, moment_kinds
from spp_export.slicing.compensation import Compensator
from spp_export.slicing.projections import Projections

# Enough for every way of choosing in a grid, which goes budget by budget and asks for each again.
_REMEMBERED = 64


@dataclass
class Planner:
    """Plans rows for a scenario. What rows share, such as scores and mixtures, is made once.

    wrong: another scenario, for the control of that name. others: artifacts by the name that rows
    give them. calibration_tokens: most that are read of a scenario. answering: of its prompts.
    """

    session: Session
    artifacts: Artifacts
    scenario: Scenario
    wrong: Scenario | None = None
    others: Mapping[str, Artifacts] = field(default_factory=dict)
    calibration_tokens: int = DEFAULT_CALIBRATION_TOKENS
    answering: Answering = field(default_factory=Answering)
    _parts: dict[tuple[str, Text], tuple[WeightedTexts, ...]] = field(default_factory=dict)
    _options: dict[Row, UnitOptions] = field(default_factory=dict)

    def plan(self, row: Row) -> PlannedRow:
        """Choose units for a row by its criterion, and re-fit what stays."""
        shape = self.session.source.shape
        options = self._scored(row)
        budget = Budget(keep=row.keep, units=row.units)
        layers, realised = compile_units(
            options.heads, options.channels, shape, budget, experts=options.experts
        )
        return self._planned(row, layers, {"keep": realised.keep})

    def take(self, row: Row, plan: Plan) -> PlannedRow:
        """Take the units of a plan as they are, and re-fit as the plan says."""
        shape = self.session.source.shape
        keep = kept_share(shape, plan.layer_shapes(shape), row.units)
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
            moments = gather_parts(self.session, self._calibration(row), kinds)
        shapes = compiled.layer_shapes(source.shape)
        realised |= {
            "parameters": source.shape.parameters(shapes),
            "kv_bytes_per_token": source.shape.kv_bytes_per_token(shapes),
        }
        inside = source.shape.expert_channels and includes(row.units, "channels")
        of_mlps: Units = "experts" if any(source.shape.sparse) and not inside else "channels"
        for units in ("heads", of_mlps):
            realised[f"{units.removesuffix('s')}_keep"] = kept_share(source.shape, shapes, units)
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
                self._calibration(row),
                request,
                whitelist=row.whitelist,
            )
            self._options[same] = scoring.options()
        return self._options[same]

    def _calibration(self, row: Row) -> tuple[WeightedTexts, ...]:
        key = (row.artifacts, row.text)
        if key not in self._parts:
            self._parts[key] = self._mixed(self._of(row), row.text)
        return self._parts[key]

    def _mixed(self, artifacts: Artifacts, text: Text) -> tuple[WeightedTexts, ...]:
        mixing = requested_mixing(artifacts, PlanRequest())
        answered = self.answering.tokens > 0
        if text == "mean":
            return calibration_parts(artifacts, None, (), mixing, answered=answered)
        scenario = self._scenario(text)
        limit = self.calibration_tokens
        traffic = scenario_traffic(self.session, scenario, limit, self.answering)
        texts = traffic.calibration.texts
        if text == "own":
            return (WeightedTexts(texts, 1.0),)
        mixture = diagnose_prompts(
            self.session,
            artifacts,
            scenario_text(self.session, scenario, limit).calibration.texts,
        ).shares
        if text == "single":
            likeliest = max(mixture, key=lambda domain: mixture[domain])
            mixture = {domain: float(domain == likeliest) for domain in mixture}
            mixing = Mixing(0.0, mixing.scenario_weight)
        return calibration_parts(artifacts, mixture, texts, mixing, answered=answered)

    def _scenario(self, text: Text) -> Scenario:
        if text != "wrong":
            return self.scenario
        if self.wrong is None:
            raise UsageError("a row of the wrong scenario needs one: give --wrong FILE.")
        return self.wrong

    def _of(self, row: Row) -> Artifacts:
        return self.others[row.artifacts] if row.artifacts else self.artifacts


def read_plans(session: Session, paths: Sequence[str | os.PathLike[str]]) -> dict[Row, Plan]:
    """A row per plan file, among the rows of the budget it comes closest to.

    Raises PlanError for a plan that does not fit the model.
    """
    plans = {}
    for path in map(Path, paths):
        plan = read_plan(path)
        validate_plan(plan, session.source.shape, session.source.fingerprint)
        name = path.stem if path.name != "plan.json" else path.absolute().parent.name
        plans[_plan_row(session, plan, name)] = plan
    return plans


def _plan_row(session: Session, plan: Plan, name: str) -> Row:
    shape = session.source.shape
    heads, channels = (
        any(loses(layer, role, shape) for layer in plan.layers) for role in (Role.OUTPUT, Role.DOWN)
    )
    channels = channels or any(layer.expert_channels is not None for layer in plan.layers)
    units: Units = "both" if heads and channels else "channels" if channels else "heads"
    if any(layer.experts is not None for layer in plan.layers):
        units = "all" if heads else "experts"
    share = round(kept_share(shape, plan.layer_shapes(shape), units), 2)
    digest = hashlib.sha256(plan.to_json().encode()).hexdigest()
    return Row(share, units, f"plan {name}", compensation=plan.compensation, plan=digest)


@dataclass
class RowOpener:
    """Opens rows for the runner.

    plans: of the rows that name one. prior: texts that dynamic rows take their history from.
    roundings: of yardsticks that are rounded, by their names.
    """

    session: Session
    planner: Planner
    plans: Mapping[Row, Plan]
    prior: Sequence[str]
    roundings: Mapping[str, Rounding] = field(default_factory=dict)

    def open(self, row: Row) -> OpenedRow:
        """The row's model, in a context; a SppError where it cannot be planned."""
        if row.kind == "dense":
            return OpenedRow({"keep": 1.0}, lambda: nullcontext(self.session.model))
        if row.kind == "yardstick":
            return OpenedRow({"keep": 1.0}, self._yardstick(row))
        if row.kind == "dynamic":
            opened: OpenedRow = BASELINES[row.criterion](self.session, row, self.prior)
            return opened
        if row in self.plans:
            planned = self.planner.take(row, self.plans[row])
        else:
            planned = self.planner.plan(row)
        return OpenedRow(planned.realised, lambda: self._masked(row, planned))

    def _yardstick(self, row: Row) -> Opened:
        if row.criterion == HALF:
            half = replace(self.session, dtype="bfloat16", remembered={})
            return lambda: nullcontext(half.model)
        projections = rounded_projections(self.session.source, self.roundings[row.criterion])
        return lambda: self._replaced(self._dense, projections)

    @property
    def _dense(self) -> Plan:
        source = self.session.source
        return dense_plan(source.shape, source.fingerprint, source.name)

    def _masked(self, row: Row, planned: PlannedRow) -> AbstractContextManager[nn.Module]:
        plan = replace(self._dense, layers=planned.layers, compensation=row.compensation)
        return self._replaced(plan, planned.projections)

    def _replaced(self, plan: Plan, projections: Projections) -> AbstractContextManager[nn.Module]:
        source = self.session.source
        return masked_dense(self.session.model, source.family, source.shape, plan, projections)

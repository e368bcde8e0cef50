"""The model of each row of an evaluation: masked dense, as planned, given or batch by batch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from spp_export.evaluation.harness import PlannedRow, Row, RowPlanner
from spp_export.evaluation.harness.grid import BASELINES
from spp_export.evaluation.harness.runner import OpenedRow
from spp_export.evaluation.oracle import masked_dense
from spp_export.models.families import Role
from spp_export.models.session import Session
from spp_export.models.shape import Units, unit_parameters
from spp_export.planning import Plan, dense_plan, read_plan, validate_plan
from spp_export.planning.written import loses


def given_plans(session: Session, paths: Sequence[str | os.PathLike[str]]) -> dict[Row, Plan]:
    """A row per plan file, among the rows of the budget it comes closest to.

    Raises PlanError for a plan that does not fit the model.
    """
    found = {}
    for path in map(Path, paths):
        plan = read_plan(path)
        validate_plan(plan, session.source.shape, session.source.fingerprint)
        name = path.stem if path.name != "plan.json" else path.absolute().parent.name
        found[_plan_row(session, plan, name)] = plan
    return found


def _plan_row(session: Session, plan: Plan, name: str) -> Row:
    shape = session.source.shape
    heads, channels = (
        any(loses(layer, role, shape) for layer in plan.layers) for role in (Role.OUTPUT, Role.DOWN)
    )
    units: Units = "both" if heads and channels else "channels" if channels else "heads"
    kept = unit_parameters(shape, plan.layer_shapes(shape), units)
    share = round(kept / unit_parameters(shape, shape.layers, units), 2)
    digest = hashlib.sha256(plan.to_json().encode()).hexdigest()
    return Row(share, units, f"plan {name}", compensation=plan.compensation, plan=digest)


@dataclass
class RowOpener:
    """Opens rows for the runner.

    given: plans of the rows that name one. prior: texts that dynamic rows take their history from.
    """

    session: Session
    planner: RowPlanner
    given: Mapping[Row, Plan]
    prior: Sequence[str]

    def open(self, row: Row) -> OpenedRow:
        """The row's model, in a context; a SppError where it cannot be planned."""
        if row.kind == "dense":
            return OpenedRow({"keep": 1.0}, lambda: nullcontext(self.session.model))
        if row.kind == "dynamic":
            opened: OpenedRow = BASELINES[row.criterion](self.session, row, self.prior)
            return opened
        if row in self.given:
            planned = self.planner.given(row, self.given[row])
        else:
            planned = self.planner.plan(row)
        return OpenedRow(planned.realised, lambda: self._masked(row, planned))

    @contextmanager
    def _masked(self, row: Row, planned: PlannedRow) -> Iterator[nn.Module]:
        source = self.session.source
        plan = dense_plan(source.shape, source.fingerprint, source.name)
        plan = replace(plan, layers=planned.layers, compensation=row.compensation)
        with masked_dense(
            self.session.model, source.family, source.shape, plan, planned.projections
        ) as model:
            yield model

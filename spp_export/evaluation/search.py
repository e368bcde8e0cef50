"""The smallest plan whose model stays as close to the dense one as was asked.

Scores are computed once; every size that is tried is an exact plan of its own, run as the masked
dense model, which is what its slim model computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from spp_export.common.errors import BudgetError, QualityError, UsageError
from spp_export.common.progress import progress
from spp_export.data.scenario import MIN_PROMPTS_TO_HOLD_OUT
from spp_export.evaluation.oracle import masked_dense
from spp_export.evaluation.quality import Quality, held_out_source, measure_quality
from spp_export.evaluation.remarks import Wanted
from spp_export.models.session import Session
from spp_export.models.shape import unit_parameters
from spp_export.planning.planner import Planning, PlanResult
from spp_export.planning.request import FRONTIER_SHARES
from spp_export.slicing.compensation import plan_compensation
from spp_export.slicing.projections import Projections

# Of the share that is kept, and of the parameters of the model: what is found is as near to the
# smallest one.
_STEP, _SIZE_STEP = 1 / 64, 0.008
# What is written is measured once more, and sums of fewer terms round otherwise.
_MARGIN = 0.995
# KL goes up and down a little from one plan to the next. Where a plan loses so many times what may
# be lost, no smaller one is looked at.
_BEYOND = 1.25


@dataclass(frozen=True)
class TriedPlan:
    """A plan of one budget, and its quality on held-out traffic."""

    keep: float
    result: PlanResult
    quality: Quality

    @property
    def parameters(self) -> int:
        """Of the slim model."""
        return self.result.predicted.parameters


class PlanSearch:
    """Plans of one scenario, tried at one budget after the other; each share once."""

    def __init__(self, planning: Planning) -> None:
        session, scenario = planning.session, planning.scenario
        if session.from_disk:
            raise UsageError(
                "a budget of quality tries many plans, and this model runs from disk. Give --keep "
                "or --max-params, or a device that holds the model."
            )
        self._planning = planning
        shape = session.source.shape
        self._units = unit_parameters(shape, shape.layers, planning.request.units)
        self._texts = planning.text.held_out.texts
        self._source = held_out_source(self._texts)
        self.tried: dict[float, TriedPlan] = {}
        if not self._texts:
            raise UsageError(
                f"scenario {scenario.name}: a budget of quality needs held-out text, of at least "
                f"{MIN_PROMPTS_TO_HOLD_OUT} prompts. Give it more, or another budget."
            )

    def at(self, keep: float) -> TriedPlan:
        """The best plan that keeps this share of the units' cost. Raises BudgetError."""
        if keep not in self.tried:
            budget = replace(self._planning.request.budget, keep=keep, max_params=None)
            result = self._planning.within(budget)
            # Budgets that are close may have one plan.
            same = (
                one for one in self.tried.values() if one.result.plan.layers == result.plan.layers
            )
            known = next(same, None)
            quality = known.quality if known else self._measured(result)
            self.tried[keep] = TriedPlan(keep, result, quality)
        return self.tried[keep]

    def smallest(self, wanted: Wanted) -> TriedPlan:
        """The smallest plan that is as near to the dense model as wanted; what was wanted is in
        its record.

        Bisection over kept shares, which would be all if quality fell with every step. As it need
        not, the smaller plans of `spp frontier` are then tried, until one is far beyond what is
        wanted. Raises QualityError where the largest plan that drops anything is not near enough.
        """
        good: TriedPlan | None = None
        low, high = 0.0, 1.0
        with progress("looking for the smallest model", None) as advance_to:
            while high - low > self._step(good):
                middle = (low + high) / 2
                tried = self._tried(middle)
                if tried and _holds(wanted, tried, _MARGIN):
                    good, high = tried, middle
                else:
                    low = middle
                advance_to(len(self.tried))
            for share in FRONTIER_SHARES if good else ():
                if share >= low:
                    continue
                tried = self._tried(share)
                if not tried or not _holds(wanted, tried, _BEYOND):
                    break
                good = tried if _holds(wanted, tried, _MARGIN) else good
                advance_to(len(self.tried))
        if good is None:
            least = min(self.tried.values(), key=lambda one: one.quality.mean_kl, default=None)
            nearest = ""
            if least:
                of = least.quality
                nearest = f" The nearest keeps {least.keep:.0%}: mean KL {of.mean_kl:.3g}, "
                nearest += f"same token {of.top1:.1%}."
            raise QualityError(
                f"{wanted.words}: no plan that removes anything holds it.{nearest} Ask for less."
            )
        plan = good.result.plan
        budget = {**plan.budget, "asked": {**plan.budget["asked"], **wanted.to_dict()}}
        return replace(good, result=replace(good.result, plan=replace(plan, budget=budget)))

    def _tried(self, keep: float) -> TriedPlan | None:
        """`at`; None where no model of this kind is so small."""
        try:
            return self.at(keep) if keep > 0 else None
        except BudgetError:
            return None

    def _step(self, plan: TriedPlan | None) -> float:
        """How far below the share of a plan the next smaller one may be left out."""
        if plan is None:
            return _STEP
        return min(_STEP, _SIZE_STEP * plan.parameters / self._units)

    def _measured(self, result: PlanResult) -> Quality:
        planning = self._planning
        session: Session = planning.session
        compensation = plan_compensation(
            session,
            planning.artifacts,
            result.plan,
            planning.scenario,
            planning.request,
            blocks=True,
        )
        masked = MaskedModel(session, result, compensation.projections())
        quality = measure_quality(
            session.model, masked, session.tokenizer, self._texts, self._source
        )
        assert quality, "held-out text has answers"
        return quality


def _holds(wanted: Wanted, tried: TriedPlan, share: float) -> bool:
    return wanted.held_by(tried.quality.mean_kl, tried.quality.top1, share)


class MaskedModel(nn.Module):
    """The masked dense model of a plan, as a model to call; between calls the dense one is as it
    was."""

    def __init__(self, session: Session, result: PlanResult, projections: Projections) -> None:
        super().__init__()
        self.dense = session.model
        source = session.source
        self._masked = source.family, source.shape, result.plan, projections

    def forward(self, **inputs: Any) -> Any:
        """As of the dense model."""
        with masked_dense(self.dense, *self._masked) as model:
            return model(**inputs)


def try_shares(search: PlanSearch, shares: Sequence[float]) -> list[TriedPlan]:
    """Plans at these shares, the largest first; shares that no plan has are left out."""
    plans = []
    with progress("drawing the frontier", len(shares)) as advance_to:
        for number, share in enumerate(sorted(shares, reverse=True), start=1):
            try:
                plans.append(search.at(share))
            except BudgetError:
                break
            finally:
                advance_to(number)
    return plans


def knee(plans: Sequence[TriedPlan]) -> TriedPlan:
    """Where removing more begins to cost more than it did: the plan furthest below the straight
    line from the first to the last one, both axes scaled to that line (Kneedle: Satopaa et al.,
    2011)."""
    first, last = plans[0], plans[-1]
    saved = first.parameters - last.parameters
    lost = last.quality.mean_kl - first.quality.mean_kl
    if saved <= 0 or lost <= 0:
        return last

    def gain(plan: TriedPlan) -> float:
        share = (first.parameters - plan.parameters) / saved
        return share - (plan.quality.mean_kl - first.quality.mean_kl) / lost

    return max(plans, key=gain)

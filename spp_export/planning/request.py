"""What may be asked of a plan."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from spp_export.common.errors import UsageError
from spp_export.domains.diagnosis import Diagnosis
from spp_export.importance import COMPARABLE, CRITERIA, SetCriterion
from spp_export.models.engines import Engine, engines_for
from spp_export.models.shape import UNITS, ModelShape, Units
from spp_export.planning import COMPENSATIONS, LAYOUTS, Compensation, Layout, Plan
from spp_export.planning.bound import Predicted
from spp_export.planning.budget import COSTS, DEFAULT_KEEP, Budget, Cost
from spp_export.planning.latency import LatencyTable, read_latency_table
from spp_export.planning.scoring import CRITERION_NAMES, DEFAULT_CRITERION

POLICIES = ("exact", "published")


# Of --keep and --strength where no word is said of units.
DEFAULT_UNITS: Units = "heads"


DEFAULT_MULTIPLE = 64


@dataclass(frozen=True)
class PlanRequest:
    """What the user may ask of a plan; `spp plan` and `spp export` take the same.

    profile: a file with a table of latency, where that is the cost. tp: the cards that a server
    will spread every layer over.
    """

    keep: float | None = None
    max_params: int | None = None
    max_kv_bytes: int | None = None
    strength: float | None = None
    layout: str = "per-layer"
    criterion: str | None = None
    policy: str = "exact"
    compensate: str = "lstsq"
    regime: str | None = None
    units: str = DEFAULT_UNITS
    comparable: str | None = None
    width_multiple: int = DEFAULT_MULTIPLE
    shrinkage: float | None = None
    adapt: bool = True
    seed: int = 0
    cost: str = "params"
    profile: str | None = None
    max_latency: float | None = None
    tp: int = 1

    @property
    def budget(self) -> Budget:
        """The budget asked for; the default share where none was."""
        asked = (self.keep, self.max_params, self.max_kv_bytes, self.strength)
        cost: Cost = next((known for known in COSTS if known == self.cost), "params")
        if all(limit is None for limit in (*asked, self.max_latency)):
            return Budget(keep=DEFAULT_KEEP, units=_units(self), cost=cost)
        return Budget(*asked, units=_units(self), cost=cost, max_latency=self.max_latency)

    @property
    def criterion_name(self) -> str:
        """The criterion asked for; the default one of the compensation where none was."""
        return self.criterion or DEFAULT_CRITERION[self.compensate]

    def check(self) -> None:
        """UsageError for a word that names nothing, or a budget that is none."""
        for option, value, known in (
            ("--units", self.units, UNITS),
            ("--layout", self.layout, LAYOUTS),
            ("--criterion", self.criterion or CRITERION_NAMES[0], CRITERION_NAMES),
            ("--comparable", self.comparable or "raw", COMPARABLE),
            ("--policy", self.policy, POLICIES),
            ("--compensate", self.compensate, COMPENSATIONS),
            ("--cost", self.cost, COSTS),
        ):
            if value not in known:
                raise UsageError(f"{option} {value}: expected one of {', '.join(known)}.")
        self.budget.to_dict()
        self._check_cost()
        if self.tp < 1:
            raise UsageError(f"--tp {self.tp}: expected 1 or more.")
        if self.tp > 1 and (self.layout == "ragged" or self.policy == "published"):
            raise UsageError("--tp: only regular plans of policy exact divide among cards.")
        if self.width_multiple < 1:
            raise UsageError(f"--width-multiple {self.width_multiple}: expected 1 or more.")
        if self.shrinkage is not None and not 0 <= self.shrinkage <= 1:
            raise UsageError(f"--shrinkage {self.shrinkage}: expected a number in [0, 1].")
        criterion = CRITERIA.get(self.criterion_name)
        if isinstance(criterion, SetCriterion) and self.comparable is not None:
            raise UsageError(
                f"--comparable: {criterion.name} weighs losses in one currency; leave it out."
            )

    def _check_cost(self) -> None:
        if (self.cost == "latency") != (self.profile is not None):
            raise UsageError(
                "--cost latency and --profile FILE go together: the file is the table that "
                "'spp bench --profile' wrote."
            )
        if self.cost == "latency" and self.layout == "ragged":
            raise UsageError("--layout ragged: tables of latency have regular layers only.")
        if self.cost != "params" and self.policy == "published":
            raise UsageError("--policy published takes no --cost: it has a budget of its own.")
        self.latency()

    def latency(self) -> LatencyTable | None:
        """The table asked for, if any. Raises ProfileError."""
        return None if self.profile is None else read_latency_table(self.profile)


@dataclass(frozen=True)
class PlanResult:
    """A compiled plan, why it is so, and what it will come to."""

    plan: Plan
    shape: ModelShape
    diagnosis: Diagnosis | None
    predicted: Predicted

    @property
    def engines(self) -> tuple[Engine, ...]:
        """Engines that will, or will not, load what the plan describes."""
        return engines_for(self.plan.written_layout, self.plan.written_shapes(self.shape))

    def to_dict(self) -> dict[str, Any]:
        """For `--json`: `plan` is the document that `--plan` reads."""
        return {
            "plan": json.loads(self.plan.to_json()),
            "dense_heads": {"query": self.shape.query_heads, "kv": self.shape.kv_heads},
            "engines": [engine.to_dict() for engine in self.engines],
        }


def _units(request: PlanRequest) -> Units:
    return next((known for known in UNITS if known == request.units), DEFAULT_UNITS)


def _layout(request: PlanRequest) -> Layout:
    return next(known for known in LAYOUTS if known == request.layout)


def _compensation(request: PlanRequest) -> Compensation:
    return next(known for known in COMPENSATIONS if known == request.compensate)

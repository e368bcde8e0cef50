"""What one row of an evaluation is, and what a planner makes of it. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from spp_export.models.families import Role
from spp_export.models.shape import Units
from spp_export.planning import Compensation, LayerPlan, Plan

if TYPE_CHECKING:
    from spp_export.slicing.projections import Projection

Text = Literal["scenario", "mean", "wrong", "single", "own"]
Kind = Literal["method", "control", "ablation", "dense", "dynamic"]

_TEXT_LABELS = {
    "scenario": "",
    "mean": "domain mean",
    "wrong": "wrong scenario",
    "single": "single domain",
    "own": "its own text only",
}


@dataclass(frozen=True)
class Row:
    """How units are chosen and made up for, at one budget.

    keep         share of the parameters of `units` that may stay
    criterion    its name, or that of a given plan
    comparable   how scores of layers are put beside each other; None for the criterion's own way
    text         what speaks for the scenario, in choosing and in compensating: the domains as
                 diagnosed with the scenario's own prompts, all domains alike, another scenario,
                 the likeliest domain alone, or the scenario's prompts alone
    seed         of everything random about the row
    whitelist    whether the artifacts' whitelist is forced in
    kind         control: what a method has to beat; ablation: a method less one of its parts;
                 dynamic: masks chosen anew for every batch, which no checkpoint can hold
    artifacts    name of other artifacts that replace the evaluation's own; "" for none
    plan         SHA-256 of a given plan; "" where the planner decides
    """

    keep: float
    units: Units
    criterion: str
    comparable: str | None = None
    compensation: Compensation = "lstsq"
    text: Text = "scenario"
    seed: int = 0
    whitelist: bool = True
    kind: Kind = "method"
    artifacts: str = ""
    plan: str = ""

    @property
    def label(self) -> str:
        """What a table calls the row, apart from its budget and compensation."""
        if self.kind == "dense":
            return "dense"
        name = self.criterion
        if name == "random" and self.whitelist:
            name = "whitelist only"
        details = [_TEXT_LABELS[self.text]]
        if self.criterion == "random" and self.kind == "control" and not self.whitelist:
            details.append(f"seed {self.seed}")
        if self.kind == "ablation" and not self.whitelist:
            details.append("no whitelist")
        if self.artifacts:
            details.append(f"artifacts {self.artifacts}")
        if self.comparable is not None:
            details.append(self.comparable)
        return ", ".join([name, *filter(None, details)])

    def to_dict(self) -> dict[str, Any]:
        """The row's object in a results file."""
        return asdict(self)


DENSE = Row(1.0, "both", "dense", compensation="none", whitelist=False, kind="dense")


@dataclass(frozen=True)
class PlannedRow:
    """What a row keeps, and the projections that were re-fitted for it.

    realised: JSON values for the record; `keep` is the share of the parameters of the row's units
    that stays. projections: by layer and role, for the masked dense model.
    """

    layers: tuple[LayerPlan, ...]
    realised: Mapping[str, Any]
    projections: Mapping[tuple[int, Role], Projection]


class RowPlanner(Protocol):
    """Turns rows into what they keep. Any SppError it raises becomes the row's result."""

    def plan(self, row: Row) -> PlannedRow:
        """Choose units for a row by its criterion, and re-fit what stays."""

    def given(self, row: Row, plan: Plan) -> PlannedRow:
        """Take the units of a plan as they are, and re-fit as the plan says."""


def row_key(row: Row, context: str) -> str:
    """SHA-256 of a row within an evaluation; `context` is the hash of what all rows share."""
    text = json.dumps([row.to_dict(), context], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()

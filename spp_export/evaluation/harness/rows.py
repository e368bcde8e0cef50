"""What one row of an evaluation is, and what a planner makes of it. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from spp_export.models.families import Role
from spp_export.models.shape import Units
from spp_export.planning import Compensation, LayerPlan

if TYPE_CHECKING:
    from spp_export.slicing.projections import Projection

Text = Literal["scenario", "mean", "wrong", "single", "own"]
RowKind = Literal["method", "control", "ablation", "dense", "yardstick", "dynamic"]

_TEXT_LABELS = {
    "scenario": "",
    "mean": "domain mean",
    "wrong": "wrong scenario",
    "single": "single domain",
    "own": "its own text only",
}


@dataclass(frozen=True)
class Row:
    """How units are chosen and compensated, at one budget.

    keep         share of the parameters of `units` that may stay
    criterion    its name, that of a plan file, or that of a yardstick
    comparable   how scores of layers are put beside each other; None for the criterion's own way
    text         what is calibrated on, to choose and to compensate: the domains as diagnosed with
                 the scenario's own prompts, all domains alike, another scenario, the likeliest
                 domain alone, or the scenario's prompts alone
    seed         of everything random about the row
    whitelist    whether the artifacts' whitelist is forced in
    kind         control: what a method has to beat; ablation: a method less one of its parts;
                 yardstick: the dense model with fewer bits; dynamic: masks chosen anew for every
                 batch, which no checkpoint can hold
    artifacts    name of other artifacts that replace the evaluation's own; "" for none
    plan         SHA-256 of a plan file; "" where the planner decides
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"strict": True, "extra": "forbid"}

    keep: float
    units: Units
    criterion: str
    comparable: str | None = None
    compensation: Compensation = "lstsq"
    text: Text = "scenario"
    seed: int = 0
    whitelist: bool = True
    kind: RowKind = "method"
    artifacts: str = ""
    plan: str = ""

    @property
    def label(self) -> str:
        """What a table calls the row, apart from its budget and compensation."""
        if self.kind == "dense":
            return "dense"
        if self.kind == "yardstick":
            return f"dense in {self.criterion}"
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

    @property
    def whole(self) -> bool:
        """Whether nothing is removed: the dense model, or a yardstick."""
        return self.kind in ("dense", "yardstick")

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


def row_key(row: Row, context: str) -> str:
    """SHA-256 of a row within an evaluation; `context` is the hash of what all rows share."""
    text = json.dumps([row.to_dict(), context], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


RANDOM_SEEDS = (0, 1, 2)
# The dense model in fewer bits, which users know the loss of: computed in bfloat16, and its
# projections rounded to nearest in blocks of 32, symmetric (GGUF's q8_0 and q4_0).
HALF, ROUNDED = "bf16", ("int8", "int4")
# They mask the dense model batch by batch; nothing of them can be compensated or exported.
DYNAMIC = ("probe-pruning", "full-batch-probing")
# Name -> what opens a row of it, from the session, the row and texts of a history. Whoever has
# such a baseline registers it, as benchmarks/spp_campaigns/probe_pruning.py does.
BASELINES: dict[str, Callable[[Any, Row, Sequence[str]], Any]] = {}


def standard_rows(
    keeps: Sequence[float],
    criteria: Sequence[str],
    units: Sequence[Units] = ("heads",),
    compensations: Sequence[Compensation] = ("lstsq",),
    *,
    comparable: str | None = None,
    wrong: bool = True,
    ablations: bool = False,
    other_artifacts: Sequence[str] = (),
    yardsticks: Sequence[str] = (),
) -> tuple[Row, ...]:
    """The dense row and `yardsticks`, then budget by budget the criteria and their controls, each
    row once.

    Controls: random with three seeds, the whitelist filled up at random, and the first criterion
    with all domains alike and (`wrong`) with another scenario. Ablations: the first criterion
    without the whitelist, with one domain, and with each of `other_artifacts`.
    """
    rows = [DENSE]
    rows += [replace(DENSE, criterion=name, kind="yardstick") for name in yardsticks]
    for keep in keeps:
        for unit in units:
            rows += [
                Row(keep, unit, name, compensation="none", whitelist=False, kind="dynamic")
                for name in criteria
                if name in DYNAMIC
            ]
            for compensation in compensations:
                base = Row(keep, unit, "", comparable, compensation)
                static = [name for name in criteria if name not in DYNAMIC]
                rows += [_method(replace(base, criterion=name)) for name in static]
                rows += _controls(base, static[:1], wrong)
                if ablations:
                    rows += _ablations(base, static[:1], other_artifacts)
    return tuple(dict.fromkeys(rows))


def _method(row: Row) -> Row:
    """`random` is a control, however it is requested."""
    return _random(row, 0) if row.criterion == "random" else row


def _random(base: Row, seed: int) -> Row:
    return replace(
        base, criterion="random", comparable=None, seed=seed, whitelist=False, kind="control"
    )


def _controls(base: Row, first: Sequence[str], wrong: bool) -> Iterator[Row]:
    for seed in RANDOM_SEEDS:
        yield _random(base, seed)
    yield replace(_random(base, 0), whitelist=True)
    for name in first:
        control = replace(base, criterion=name, kind="control")
        yield replace(control, text="mean")
        if wrong:
            yield replace(control, text="wrong")


def _ablations(base: Row, first: Sequence[str], other_artifacts: Sequence[str]) -> Iterator[Row]:
    for name in first:
        ablation = replace(base, criterion=name, kind="ablation")
        yield replace(ablation, whitelist=False)
        yield replace(ablation, text="single")
        for other in other_artifacts:
            yield replace(ablation, artifacts=other)

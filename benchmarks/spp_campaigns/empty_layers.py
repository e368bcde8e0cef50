"""Does the best plan leave out attention or MLPs of whole layers?

`python -m spp_campaigns.empty_layers [--model M] [--scenario FILE] [--removed 0.2] [--json FILE]`

Plans of one scenario for several budgets, each twice: all layers keep some heads and channels, or
a layer may keep none. Both are exact, from the same losses, so the second never loses more.
Nothing is written. The predicted loss is that of the criterion of `spp plan`: nats by `fisher`,
the relative energy of the stream by `obs`; the two are no figures of one kind.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from spp_campaigns.command import finish, machine, parser, table
from spp_export.data.artifacts import open_artifacts
from spp_export.data.scenario import read_scenario
from spp_export.models.hub import DEMO
from spp_export.models.session import Session, open_session
from spp_export.models.shape import Units
from spp_export.planning.budget import Budget
from spp_export.planning.planner import Planning, PlanResult
from spp_export.planning.request import PlanRequest

_SCENARIO = Path(__file__).resolve().parents[1] / "data" / "scenarios" / "chemistry.txt"
# Of any model; a model of experts has more.
_UNITS = ("heads", "channels", "both")
_COLUMNS = {
    "units": "{units}",
    "removed": "{removed:.0%}",
    "criterion": "{criterion}",
    "without attention": "{without_attention}",
    "without MLP": "{without_mlp}",
    "predicted loss": "{loss:.5g}",
    "where all keep some": "{loss_of_whole:.5g}",
    "parameters": "{parameters:,}",
    "KV bytes": "{kv_bytes:,}",
}


def rows(session: Session, request: PlanRequest, planning: Planning, removed: list[float]) -> Any:
    """A row for every share removed."""
    never = replace(planning, request=replace(request, allow_empty_layers=False), scored={})
    for share in removed:
        budget = Budget(keep=round(1 - share, 6), units=request.units)
        chosen, whole = planning.within(budget), never.within(budget)
        layers = chosen.plan.layers
        yield {
            "units": request.units,
            "removed": share,
            "criterion": chosen.plan.criterion["name"],
            "without_attention": [i for i, layer in enumerate(layers) if not layer.kv_heads],
            "without_mlp": [i for i, layer in enumerate(layers) if layer.channels == ()],
            "loss": _loss(chosen),
            "loss_of_whole": _loss(whole),
            "parameters": chosen.predicted.parameters,
            "kv_bytes": chosen.predicted.kv_bytes,
        }


def _loss(result: PlanResult) -> float:
    realised = result.plan.budget["realised"]
    loss: float = realised["dense_score"] - realised["score"]
    return loss


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--model", default=DEMO)
    options.add_argument("--artifacts")
    options.add_argument("--scenario", type=Path, default=_SCENARIO)
    options.add_argument("--units", nargs="+", default=_UNITS, choices=get_args(Units))
    options.add_argument("--removed", nargs="+", type=float, default=[0.2, 0.3, 0.4, 0.5])
    asked = options.parse_args()
    session, scenario = open_session(asked.model), read_scenario(asked.scenario)
    artifacts = open_artifacts(asked.artifacts, asked.model, session.source)
    found: list[dict[str, Any]] = []
    for units in asked.units:
        request = PlanRequest(units=units, keep=1 - min(asked.removed))
        planning = Planning.begin(session, artifacts, scenario, request)
        found += rows(session, request, planning, asked.removed)
    finish(
        asked,
        {"machine": machine(), "scenario": scenario.name, "rows": found},
        table(_COLUMNS, found),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

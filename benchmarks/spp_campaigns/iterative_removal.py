"""Whether removal in several steps does better than in one: `python -m
spp_campaigns.iterative_removal --model demo --scenario FILE --other FILE`.

After each step the model is written as it is by then, with zeros for what is removed and the
others re-fitted, and statistics of the same text are gathered from it anew, for the next step to
choose by and to re-fit on. How much the loss feels a change at a token of the artifacts' answers
stays as the dense model had it. Plans are compared on the dense model's answers to held-out
prompts of the scenario, and of another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spp_campaigns.choices import UNITS, Answers, opened, two_scenarios
from spp_campaigns.command import finish, machine, scratch, table
from spp_export.calibration.reading import ScenarioText
from spp_export.data.artifacts import Artifacts
from spp_export.data.scenario import Scenario
from spp_export.evaluation.oracle import masked_dense
from spp_export.models.session import Session, open_session
from spp_export.models.shape import Units
from spp_export.planning.budget import Budget
from spp_export.planning.planner import Planning
from spp_export.planning.request import PlanRequest
from spp_export.slicing.compensation import plan_compensation

_KEEP = 0.8
_STEPS = (1, 2, 4)
_COLUMNS = {
    "scenario": "{scenario}",
    "units": "{units}",
    "steps": "{steps}",
    "KL": "{own[kl]:.3f} [{own[low]:.3f}, {own[high]:.3f}]",
    "same token": "{own[same_token]:.1%}",
    "KL of another scenario": "{other[kl]:.3f}",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row for each number of steps, of heads and of heads and channels."""
    made = two_scenarios(__doc__, writes=True)
    made.add_argument("--steps", type=int, action="append", help="number of steps; repeatable")
    options = made.parse_args(arguments)
    session, artifacts, scenario, answers = opened(options, "auto")
    rows = []
    for units in UNITS:
        for steps in options.steps or _STEPS:
            row = {"scenario": Path(options.scenario).stem, "units": units, "steps": steps}
            with scratch(options) as place:
                row |= _removed(session, artifacts, scenario, units, steps, answers, place)
            rows.append(row)
            print(table(_COLUMNS, [row]).splitlines()[-1], flush=True)
    document = {"machine": machine(), "model": options.model, "keep": _KEEP, "rows": rows}
    finish(options, document, "", table(_COLUMNS, rows))


def _removed(
    session: Session,
    artifacts: Artifacts,
    scenario: Scenario,
    units: Units,
    steps: int,
    answers: Mapping[str, Answers],
    place: Path,
) -> dict[str, Any]:
    """What is measured of the model after the last step."""
    judged: dict[str, Any] = {}
    for step in range(1, steps + 1):
        keep = 1 - (1 - _KEEP) * step / steps
        request = PlanRequest(units=units, criterion="fisher")
        planning = Planning.begin(session, artifacts, scenario, request)
        plan = planning.within(Budget(keep=keep, units=units)).plan
        compensation = plan_compensation(session, artifacts, plan, scenario, request)
        source, projections = session.source, compensation.projections()
        with masked_dense(session.model, source.family, source.shape, plan, projections) as slim:
            if step == steps:
                judged = {name: of.judged(slim) for name, of in answers.items()}
            else:
                session = _written(session, place / str(step))
    return judged


def _written(session: Session, place: Path) -> Session:
    """The model as it is now, with the answers of the dense one to the scenario's prompts."""
    model: Any = session.model
    model.save_pretrained(place)
    session.tokenizer.save_pretrained(place)
    written = open_session(str(place), matmul="auto")
    for key, known in session.remembered.items():
        if isinstance(known, ScenarioText):
            written.remembered[key] = known
    return written


if __name__ == "__main__":
    main()

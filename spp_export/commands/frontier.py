"""`frontier`: how small the model of a scenario can get, and what each size costs in quality."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spp_export.commands.requests import FrontierRequest
from spp_export.common.disk import scratch_folder
from spp_export.common.errors import BudgetError
from spp_export.common.json_files import dump_json
from spp_export.common.manifest import write_manifest
from spp_export.common.options import command
from spp_export.common.plots import Line, Point, draw_line, new_figure, save_png
from spp_export.common.publish import check_target, publish
from spp_export.data.answer_file import with_answers
from spp_export.data.artifacts import open_artifacts
from spp_export.data.scenario import read_scenario
from spp_export.formats.safetensors.write import write_slim
from spp_export.models.session import open_session
from spp_export.planning.planner import Planning
from spp_export.slicing.compensation import plan_compensation

if TYPE_CHECKING:
    from spp_export.evaluation.search import TriedPlan

_COLOUR = "C0"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MeasuredSpeed:
    """Decoding of one plan's model beside the dense one, in rounds by turns: a batch of prompts of
    `context` tokens.

    tokens_per_second, dense_tokens_per_second  of the median round
    speedup   its median, p20, p80 and others, as `spp bench` reports them, with their bound
    """

    batch: int
    context: int
    tokens_per_second: float
    dense_tokens_per_second: float
    speedup: Mapping[str, Any]


@dataclass(frozen=True)
class FrontierResult:
    """Plans of falling size, each with its quality, and the one at the knee.

    files: where each plan was written, in the same order. speeds: what was measured of each, where
    that was asked for.
    """

    path: Path
    scenario: str
    plans: Sequence[TriedPlan]
    knee: TriedPlan
    files: Sequence[Path]
    speeds: Sequence[MeasuredSpeed | None]

    def to_dict(self) -> dict[str, Any]:
        """For frontier.json and `--json`."""
        return {
            "scenario": self.scenario,
            "text": self.knee.quality.source,
            "knee": self.knee.keep,
            "plans": [
                {
                    "keep": plan.keep,
                    "plan": f"plans/{file.name}",
                    **plan.result.predicted.to_dict(),
                    "quality": plan.quality.to_dict(),
                    **({"measured": asdict(speed)} if speed else {}),
                }
                for plan, file, speed in zip(self.plans, self.files, self.speeds, strict=True)
            ],
        }


@command(FrontierRequest)
def frontier(request: FrontierRequest) -> FrontierResult:
    """Plan a scenario at many budgets and measure each plan on the held-out traffic.

    Writes frontier.json, frontier.png, and every plan, which `spp export --plan` takes; with
    `measure` each plan's model is also timed beside the dense one. Raises UsageError for a scenario
    too short to hold text out, BudgetError where no budget has a plan, ParityError for a model that
    does not compute what it should.

        spp_export.frontier("chemistry.txt", "out/frontier", units="both")
    """
    from spp_export.evaluation.search import PlanSearch, knee, try_shares

    target = Path(request.output)
    check_target(target, request.force)
    scenario = with_answers(read_scenario(request.scenario), request.answers)
    session = open_session(
        request.model,
        device=request.device,
        dtype=request.dtype,
        matmul=request.matmul,
        dequantize=request.dequantize,
    )
    artifacts = open_artifacts(request.artifacts, request.model, session.source)
    planning = Planning.begin(session, artifacts, scenario, request)
    search = PlanSearch(planning)
    plans = try_shares(search, request.share)
    if not plans:
        raise BudgetError(
            f"--share {max(request.share):g}: no such model is that small. Give larger ones."
        )
    with publish(target, request.force) as work:
        (work / "plans").mkdir()
        names = [f"keep-{plan.keep:g}.json" for plan in plans]
        for plan, name in zip(plans, names, strict=True):
            text = plan.result.plan.to_json()
            (work / "plans" / name).write_text(text, encoding="utf-8")
        files = [target / "plans" / name for name in names]
        # What times a model loads it and the dense one itself.
        session.__dict__.pop("model", None)
        speeds = [
            _speed(planning, plan, work.parent) if request.measure else None for plan in plans
        ]
        result = FrontierResult(target, scenario.name, plans, knee(plans), files, speeds)
        (work / "frontier.json").write_text(dump_json(result.to_dict()), encoding="utf-8")
        _draw(result, work / "frontier.png")
        write_manifest(work)
    return result


def _speed(planning: Planning, plan: TriedPlan, place: Path) -> MeasuredSpeed:
    """The slim model of a plan in `spp bench`, written for that alone."""
    session, request = planning.session, planning.request
    assert isinstance(request, FrontierRequest)
    compiled, case = plan.result.plan, plan.result.predicted.decode[0]
    with scratch_folder(place, "measure-") as scratch:
        out = scratch / f"keep-{plan.keep:g}"
        out.mkdir()
        compensation = plan_compensation(
            session, planning.artifacts, compiled, planning.scenario, request, blocks=True
        )
        written = write_slim(session, compiled, compensation, out)
        session.__dict__.pop("model", None)
        write_manifest(out, written.records)
        document = _bench()(
            out,
            model=request.model,
            device=request.device,
            dtype=request.dtype,
            seed=request.seed,
            batch=case.batch,
            context=case.context,
            memory=False,
        )
    for problem in document["problems"]:
        _log.warning("%s", problem)
    (cell,) = document["cells"]
    dense, slim = (row["decode"] for row in cell["rows"])
    return MeasuredSpeed(
        case.batch,
        case.context,
        slim["tokens_per_second"],
        dense["tokens_per_second"],
        slim["speedup"],
    )


def _bench() -> Any:
    """`spp_export.bench`: the floor above adds it by an entry point."""
    from importlib.metadata import entry_points

    point = next(iter(entry_points(group="spp_export", name="bench")))
    return point.load()


def _draw(result: FrontierResult, path: Path) -> None:
    """KL against the size of the model, and against the speed-up: at best, and as measured."""
    figure, grid = new_figure(1, 2, 10, 4)
    dense = result.knee.result.predicted.dense_parameters
    sizes = [100 * plan.parameters / dense for plan in result.plans]
    speeds = [plan.result.predicted.decode[0].speedup for plan in result.plans]
    for axes, places in zip(grid[0], (sizes, speeds), strict=True):
        points = [
            Point(x, plan.quality.mean_kl, *plan.quality.intervals.get("mean_kl", ()))
            for x, plan in zip(places, result.plans, strict=True)
        ]
        draw_line(axes, Line("plans", points, _COLOUR))
        at = result.plans.index(result.knee)
        draw_line(axes, Line("knee", points[at : at + 1], "C1", size=9, band=False))
        axes.set_ylabel("mean KL to the dense model, nats per token")
        axes.set_ylim(bottom=0)
        axes.legend()
    grid[0][0].set_xlabel("parameters of the dense model kept, %")
    case = result.knee.result.predicted.decode[0]
    measured = [
        Point(speed.speedup["median"], plan.quality.mean_kl)
        for plan, speed in zip(result.plans, result.speeds, strict=True)
        if speed
    ]
    if measured:
        draw_line(grid[0][1], Line("measured", measured, "C2"))
        grid[0][1].legend()
    also = " and as measured" if measured else ""
    grid[0][1].set_xlabel(
        f"speed-up of decoding at best{also}, batch {case.batch} x {case.context} tokens"
    )
    figure.suptitle(f"{result.scenario}: {result.knee.quality.source}")
    save_png(figure, path)

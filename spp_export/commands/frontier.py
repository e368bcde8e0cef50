"""`frontier`: how small the model of a scenario can get, and what each size costs in quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spp_export.commands.requests import FrontierRequest
from spp_export.common.errors import BudgetError
from spp_export.common.json_files import dump_json
from spp_export.common.manifest import write_manifest
from spp_export.common.options import command
from spp_export.common.plots import Line, Point, draw_line, new_figure, save_png
from spp_export.common.publish import check_target, publish
from spp_export.data.artifacts import open_artifacts
from spp_export.data.scenario import read_scenario
from spp_export.models.session import open_session
from spp_export.planning.planner import Planning

if TYPE_CHECKING:
    from spp_export.evaluation.search import TriedPlan

_COLOUR = "C0"


@dataclass(frozen=True)
class FrontierResult:
    """Plans of falling size, each with its quality, and the one at the knee.

    files: where each plan was written, in the same order.
    """

    path: Path
    scenario: str
    plans: Sequence[TriedPlan]
    knee: TriedPlan
    files: Sequence[Path]

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
                }
                for plan, file in zip(self.plans, self.files, strict=True)
            ],
        }


@command(FrontierRequest)
def frontier(request: FrontierRequest) -> FrontierResult:
    """Plan a scenario at many budgets and measure each plan on the held-out traffic.

    Writes frontier.json, frontier.png, and every plan, which `spp export --plan` takes. Raises
    UsageError for a scenario too short to hold text out, BudgetError where no budget has a plan.

        spp_export.frontier("chemistry.txt", "out/frontier", units="both")
    """
    from spp_export.evaluation.search import PlanSearch, knee, try_shares

    target = Path(request.output)
    check_target(target, request.force)
    scenario = read_scenario(request.scenario)
    session = open_session(
        request.model,
        device=request.device,
        dtype=request.dtype,
        dequantize=request.dequantize,
    )
    artifacts = open_artifacts(request.artifacts, request.model, session.source)
    search = PlanSearch(Planning.begin(session, artifacts, scenario, request))
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
        result = FrontierResult(target, scenario.name, plans, knee(plans), files)
        (work / "frontier.json").write_text(dump_json(result.to_dict()), encoding="utf-8")
        _draw(result, work / "frontier.png")
        write_manifest(work)
    return result


def _draw(result: FrontierResult, path: Path) -> None:
    """KL against the size of the model, and against the speed-up that it allows at best."""
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
    grid[0][1].set_xlabel(
        f"speed-up of decoding at best, batch {case.batch} x {case.context} tokens"
    )
    figure.suptitle(f"{result.scenario}: {result.knee.quality.source}")
    save_png(figure, path)

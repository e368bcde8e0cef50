"""Time from forwarding a scenario's text through the demo model to a compiled plan.

The model, the artifacts and the scores that they hold for every domain are in memory before; what
is timed is the text's forward pass, the diagnosis, the mixture of scores, and the allocation.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from spp_bench.clocks import no_collection
from spp_export.data.artifacts import open_artifacts
from spp_export.data.scenario import read_scenario
from spp_export.domains.diagnosis import diagnose_prompts
from spp_export.models.hub import DEMO
from spp_export.models.session import open_session
from spp_export.planning.planner import plan_scenario
from spp_export.planning.request import PlanRequest

# Only in a clone: no data travels with the package.
SCENARIO = Path(__file__).resolve().parents[1] / "data" / "scenarios" / "chemistry.txt"


@dataclass(frozen=True)
class DiagnosisTime:
    """Seconds of every sample, and how many of the scenario's prompts were diagnosed."""

    seconds: tuple[float, ...]
    prompts: int


def measure(keep: float, samples: int, scenario: Path = SCENARIO) -> DiagnosisTime:
    """Plan for a scenario as often as asked, after one of its prompts was read to warm up."""
    text = read_scenario(str(scenario))
    session = open_session(DEMO)
    artifacts = open_artifacts(None, DEMO, session.source)
    # Of its criteria the artifacts hold these scores, so that no other text is forwarded.
    request = PlanRequest(keep=keep, criterion="energy", adapt=False)
    calibration, _ = text.split()
    diagnose_prompts(session, artifacts, calibration[:1])
    times = []
    for _ in range(samples):
        with no_collection():
            start = time.perf_counter()
            plan_scenario(session, artifacts, text, request)
            times.append(time.perf_counter() - start)
    return DiagnosisTime(tuple(times), len(calibration))

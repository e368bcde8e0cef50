"""Time to a plan: from scores, and from the text of a scenario."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spp_bench.clocks import no_collection
from spp_bench.timing import quantiles
from spp_export.data.artifacts import open_artifacts
from spp_export.data.scenario import read_scenario
from spp_export.domains.diagnosis import diagnose_prompts
from spp_export.models.hub import DEMO
from spp_export.models.session import open_session
from spp_export.models.shape import ModelShape, Units
from spp_export.planning import compile_units
from spp_export.planning.allocate.options import channel_options, layer_options, per_parameter
from spp_export.planning.budget import Budget
from spp_export.planning.planner import plan_scenario
from spp_export.planning.request import PlanRequest

# Only in a clone: no data travels with the package.
SCENARIO = Path(__file__).resolve().parents[1] / "data" / "scenarios" / "chemistry.txt"


def from_scores(shape: ModelShape, units: Units, keep: float, seeds: int) -> dict[str, Any]:
    """Quantiles of the milliseconds that it takes to compile random scores into a plan at this
    keep share.

    Every plan is checked for optimality by its own bound.
    """
    times = []
    for seed in range(-1, seeds):
        rng = np.random.default_rng(max(seed, 0))
        heads = rng.gamma(2.0, size=(shape.num_layers, shape.query_heads))
        channels = rng.gamma(2.0, size=(shape.num_layers, shape.channels))
        head = shape.query_head_parameters + shape.kv_head_parameters / shape.group_size
        start = time.perf_counter()
        _, realised = compile_units(
            layer_options(per_parameter(heads, head), shape),
            channel_options(per_parameter(channels, shape.channel_parameters), shape)
            if units == "both"
            else None,
            shape,
            Budget(keep=keep, units=units),
        )
        elapsed = time.perf_counter() - start
        assert realised.score_bound == realised.score, "the plan is not proven optimal"
        if seed >= 0:  # the first run warms up
            times.append(elapsed * 1e3)
    return {"units": units, "keep": keep, "samples": seeds, **quantiles(times, "ms")}


@dataclass(frozen=True)
class TimeFromText:
    """Seconds of every sample, and how many of the scenario's prompts were diagnosed."""

    seconds: tuple[float, ...]
    prompts: int


def from_text(keep: float, samples: int, scenario: Path = SCENARIO) -> TimeFromText:
    """Plan for a scenario on the default model, after one of its prompts was read to warm up.

    The model, the artifacts and their scores for every domain are already in memory; what is timed
    is the text's forward pass, the diagnosis, the mixing of scores, and the allocation.
    """
    text = read_scenario(str(scenario))
    session = open_session(DEMO)
    artifacts = open_artifacts(None, DEMO, session.source)
    # The artifacts hold scores of this criterion, and these go by nothing else: no other text is
    # run through the model.
    request = PlanRequest(
        keep=keep, criterion="energy", comparable="standardised", adapt=False, answer_tokens=0
    )
    calibration, _ = text.split()
    diagnose_prompts(session, artifacts, calibration[:1])
    times = []
    for _ in range(samples):
        with no_collection():
            start = time.perf_counter()
            plan_scenario(session, artifacts, text, request)
            times.append(time.perf_counter() - start)
    return TimeFromText(tuple(times), len(calibration))

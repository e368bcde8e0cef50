"""Is a plan by measured latency faster than one by parameters, at the same kept score?

`python -m spp_campaigns.latency_plan [--context N] [--keep SHARE] [--profile FILE] [--json FILE]`

Both plans are exact, from the same scores of one scenario. The one by parameters keeps `--keep` of
them; the one by latency has the smallest budget of nanoseconds that keeps at least as much score.
Both are written and verified against the masked dense model, and then take turns at decoding with
the dense one. The interval of their ratio holds the true median of the rounds with 98 %
confidence.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import spp_export
from spp_bench import provenance
from spp_bench.candidates import torch_candidate, windows_of
from spp_bench.cases import Cell, tokens
from spp_bench.engines.runner import Runner
from spp_bench.engines.torch import TorchRunner
from spp_bench.measure import FEWEST, measure_cell, speedup
from spp_bench.profile import ProfileRequest, Target, profile
from spp_bench.results import write_document
from spp_bench.threads import torch_threads
from spp_bench.timing import quantiles
from spp_export.calibration.mixture import calibration_parts
from spp_export.calibration.reading import scenario_text
from spp_export.common.errors import BudgetError, SppError, UsageError
from spp_export.data.artifacts import open_artifacts
from spp_export.data.scenario import read_scenario
from spp_export.domains.diagnosis import diagnose_prompts
from spp_export.models.hub import DEMO
from spp_export.models.session import Session, open_session
from spp_export.models.shape import ModelShape, Units
from spp_export.planning import LayerPlan, Plan, Realised, compile_units
from spp_export.planning.budget import Budget
from spp_export.planning.latency import LatencyTable, read_latency_table
from spp_export.planning.planner import requested_mixing, scoring_for
from spp_export.planning.request import PlanRequest
from spp_export.planning.scoring import UnitOptions

_SCENARIO = Path(__file__).resolve().parents[1] / "data" / "scenarios" / "chemistry.txt"
PLANS = ("params", "latency")


@dataclass(frozen=True)
class Chosen:
    """A plan's layers, the score they keep, and the time of a step by the table, in
    nanoseconds."""

    layers: tuple[LayerPlan, ...]
    realised: Realised
    nanoseconds: int

    def to_dict(self, shape: ModelShape) -> dict[str, Any]:
        """For the results file."""
        sizes = [layer.shape(shape) for layer in self.layers]
        return {
            "score": self.realised.score,
            "parameters": self.realised.parameters,
            "predicted_ms": self.nanoseconds / 1e6,
            "query_heads": [layer.query_heads for layer in sizes],
            "kv_heads": [layer.kv_heads for layer in sizes],
            "channels": [layer.channels for layer in sizes],
        }


def choose_both(
    options: UnitOptions, shape: ModelShape, table: LatencyTable, units: Units, keep: float
) -> dict[str, Chosen]:
    """The plan of this share of parameters, and the fastest plan by the table with no less
    score."""

    def compiled(budget: Budget) -> Chosen:
        layers, realised = compile_units(
            options.heads, options.channels, shape, budget, latency=table
        )
        assert realised.score_bound == realised.score, "the plan is not proven optimal"
        step = table.step_cost([layer.shape(shape) for layer in layers])
        return Chosen(layers, realised, step)

    by_params = compiled(Budget(keep=keep, units=units))
    least = by_params.realised.score

    def within(nanoseconds: int) -> Chosen | None:
        try:
            candidate = compiled(Budget(max_latency=nanoseconds / 1e6, units=units, cost="latency"))
        except BudgetError:
            return None
        return candidate if candidate.realised.score >= least else None

    best = fastest(within, by_params.nanoseconds + 1)
    return dict(zip(PLANS, (by_params, best), strict=True))


def fastest(within: Callable[[int], Chosen | None], enough: int) -> Chosen:
    """The plan of the smallest budget that has one, as `enough` does. A larger budget never keeps
    less."""
    best = within(enough)
    assert best is not None, "a plan in hand is not found again"
    least = 0
    while enough - least > 1:
        middle = (least + enough) // 2
        better = within(middle)
        if better is None:
            least = middle
        else:
            best, enough = better, middle
    return best


def options_for(session: Session, scenario: Path, units: Units, artifacts: Path | None) -> Any:
    """The scores of units for the scenario's text, by the defaults of `spp plan`."""
    text = read_scenario(scenario)
    model = DEMO if artifacts is None else session.source.name
    scenario_artifacts = open_artifacts(artifacts, model, session.source)
    request = PlanRequest(units=units, keep=0.8)
    calibration = scenario_text(session, text, request.calibration_tokens).calibration.texts
    diagnosis = diagnose_prompts(session, scenario_artifacts, calibration)
    mixing = requested_mixing(scenario_artifacts, request)
    parts = calibration_parts(scenario_artifacts, diagnosis.shares, calibration, mixing)
    return scoring_for(session, scenario_artifacts, parts, request, diagnosis.breadth).options()


def measure(
    session: Session,
    chosen: Mapping[str, Chosen],
    model: str,
    scenario: Path,
    cell: Cell,
    new_tokens: int,
    rounds: int,
) -> dict[str, list[float]]:
    """Seconds of a decode step in every round, for the dense model and both slim ones."""
    source = session.source
    windows = windows_of(source)
    dense = torch_candidate(source, None, session.dtype, windows)
    with tempfile.TemporaryDirectory(prefix="spp-latency-") as scratch:
        runners: list[Runner] = [TorchRunner.load(dense, session.device)]
        for name, entry in chosen.items():
            target = Path(scratch) / name
            plan = Plan(source.fingerprint, source.name, "per-layer", "none", entry.layers)
            spp_export.export(
                scenario,
                target,
                model=model,
                plan=plan,
                device=session.device,
                dtype=session.dtype,
            )
            loaded = spp_export.load_slim(
                target,
                dtype=session.torch_dtype,
                device=session.device,
                attn_implementation="sdpa",
            )
            runners.append(TorchRunner(name, loaded))
        fed = tokens(cell, new_tokens, source.shape.vocab_size)
        samples = measure_cell(runners, fed, rounds)
    return {name: sample.decode for name, sample in samples.items()}


def verdict(params: Sequence[float], latency: Sequence[float]) -> dict[str, Any]:
    """How much faster the plan by latency is, at least and at most, and the conclusion."""
    faster, slower = speedup(params, latency), speedup(latency, params)
    assert faster.low is not None, "of so few rounds nothing follows"
    assert slower.low is not None
    says = "no difference shown"
    if faster.low > 1 or slower.low > 1:
        says = f"the plan by latency is {'faster' if faster.low > 1 else 'slower'}"
    named = {"median": faster.median, "low": faster.low, "high": 1 / slower.low}
    return {**{name: round(value, 4) for name, value in named.items()}, "says": says}


def run(options: argparse.Namespace, progress: Any) -> dict[str, Any]:
    """Everything, as a document."""
    if options.rounds < FEWEST:
        raise UsageError(f"--rounds {options.rounds}: of fewer than {FEWEST} nothing follows.")
    cell = Cell(options.batch, options.context)
    threads = options.threads or provenance.physical_cores()
    session = open_session(options.model, device=options.device, dtype=options.dtype)
    shape = session.source.shape
    with tempfile.TemporaryDirectory(prefix="spp-latency-") as scratch, torch_threads(threads):
        path = options.profile or Path(scratch) / "profile.json"
        if options.profile is None:
            progress("measuring the table")
            request = ProfileRequest(
                batch=cell.batch,
                context=cell.context,
                threads=threads,
                device=options.device,
                dtype=session.dtype,
            )
            profile(Target.of_model(options.model), path, request=request)
        table = read_latency_table(path)
        table.check_model(shape)
        if (table.batch, table.context, table.phase) != (cell.batch, cell.context, "decode"):
            raise UsageError(
                f"--profile {path}: measured {table.phase} at batch {table.batch} and context "
                f"{table.context}, expected decode at {cell.label}."
            )
        progress("weighing units")
        unit_options = options_for(session, options.scenario, options.units, options.artifacts)
        chosen = choose_both(unit_options, shape, table, options.units, options.keep)
        progress("writing, verifying and timing the models")
        timing = (cell, options.new_tokens, options.rounds)
        times = measure(session, chosen, options.model, options.scenario, *timing)
    return {
        "machine": provenance.machine(options.device) | {"threads": threads},
        "versions": provenance.versions(),
        "git": provenance.revision(),
        "model": session.source.name,
        "options": {
            **{"device": options.device, "dtype": session.dtype, **cell.to_dict()},
            **{"keep": options.keep, "units": options.units, "scenario": options.scenario.name},
            **{"new_tokens": options.new_tokens, "rounds": options.rounds},
        },
        "profile": table.to_dict(),
        "dense": {"predicted_ms": table.step_cost(shape.layers) / 1e6},
        "plans": {name: entry.to_dict(shape) for name, entry in chosen.items()},
        "decode": {
            name: quantiles([1e3 * second for second in seconds], "ms")
            for name, seconds in times.items()
        },
        "speedup": verdict(times["params"], times["latency"]),
    }


def report(document: Mapping[str, Any]) -> str:
    """A few lines for people."""
    options, speedup, plans = document["options"], document["speedup"], document["plans"]
    lines = [
        f"{document['model']}, decode at batch {options['batch']}, context {options['context']}, "
        f"{options['dtype']}, {options['device']}",
        f"{'':8} {'score':>12} {'parameters':>12} {'predicted':>10} {'measured':>9} ms (p20-p80)",
    ]
    rows = {"dense": document["dense"], **plans}
    for (name, row), times in zip(rows.items(), document["decode"].values(), strict=True):
        lines.append(
            f"{name:8} {row.get('score', 0):12.5g} {row.get('parameters', ''):>12} "
            f"{row['predicted_ms']:10.3f} {times['median_ms']:9.3f}    "
            f"({times['p20_ms']:.3f}-{times['p80_ms']:.3f})"
        )
    predicted = plans["params"]["predicted_ms"] / plans["latency"]["predicted_ms"]
    lines.append(
        f"params over latency: {speedup['median']:.3f}x measured ({speedup['low']:.3f} to "
        f"{speedup['high']:.3f}), {predicted:.3f}x predicted: {speedup['says']}"
    )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="spp_campaigns.latency_plan", description=__doc__)
    made.add_argument("--model", default=DEMO)
    made.add_argument("--artifacts", type=Path, help="artifacts, unless for the default model")
    made.add_argument("--scenario", type=Path, default=_SCENARIO)
    made.add_argument("--profile", type=Path, help="a table; measured first by default")
    made.add_argument("--keep", type=float, default=0.7, help="share of parameters")
    made.add_argument("--units", choices=("heads", "channels", "both"), default="both")
    made.add_argument("--batch", type=int, default=1)
    made.add_argument("--context", type=int, default=1024)
    made.add_argument("--new-tokens", type=int, default=32)
    made.add_argument("--rounds", type=int, default=31)
    made.add_argument("--threads", type=int, help="all physical cores by default")
    made.add_argument("--device", default="cpu")
    made.add_argument("--dtype")
    made.add_argument("--json", type=Path, help="write the figures to this file")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, and write the figures where asked."""
    options = parser().parse_args(arguments)
    try:
        document = run(options, lambda stage: print(stage, file=sys.stderr))
        if options.json:
            write_document(document, options.json)
    except SppError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(report(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())

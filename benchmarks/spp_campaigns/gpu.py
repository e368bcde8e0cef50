"""Every published model shape on a CUDA card, in one call:
`python -m spp_campaigns.gpu --json DIR`.

Needs the repository and a Python with torch, transformers, numpy, safetensors and triton; no
weights, no network, no installation: `PYTHONPATH=.:cli:kernels:benchmarks`. Results are written
after every cell, and a later call measures what is missing. What the time budget did not reach is
listed at the end and in summary.json.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from spp_bench import provenance
from spp_bench.bench import BenchRequest
from spp_bench.bounds import Rates, Work
from spp_bench.cases import Cell
from spp_bench.device_rates import measure_rates
from spp_bench.engines.static import StaticRunner
from spp_bench.memory import with_prediction
from spp_bench.results import write_document
from spp_bench.shapes.bench import Models, ShapeRun, Timed, has_cell, peak_of
from spp_bench.shapes.plans import LAYOUTS, ShapePlan, Variant, shape_plan, variants
from spp_bench.shapes.shapes import BACKBONES, Published, published
from spp_export.common.errors import BudgetError, ParityError, SppError

# The middle first: if time runs out, it says the most.
KEEPS = (0.7, 0.5, 0.9)
ROUNDS, EAGER_ROUNDS, NEW_TOKENS = 5, 2, 8
_MANY, _MANY_CONTEXT, _LONG, _SHORT = 16, 4096, 8192, 128
# What a card must have free beside weights and caches: activations of a long prompt, a library's
# workspaces, what the allocator cannot use.
_SPARE_BYTES = 5 << 30
_PYTEST_SECONDS = 100.0
# Kept back from the models for the kernels of attention.
_KERNEL_SHARE = 0.25
_ROOT = Path(__file__).resolve().parents[2]
_TESTS = ("tests/bench/test_static_runner.py", "tests/kernels")


@dataclass
class Time:
    """Seconds from now on."""

    seconds: float
    start: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - (time.monotonic() - self.start)

    def part(self, share: float) -> Time:
        """A share of the time that is left, from now on."""
        return Time(max(0.0, self.left) * share)


@dataclass(frozen=True)
class Task:
    """What a call should do. `request` names the device, the rounds and the number of tokens
    decoded."""

    directory: Path
    request: BenchRequest
    names: tuple[str, ...]
    variants: tuple[Variant, ...]
    force: bool


class Outcome:
    """What a call has found so far, kept in summary.json."""

    def __init__(self, directory: Path, device: str) -> None:
        self.directory = directory
        self.summary: dict[str, Any] = {
            "machine": provenance.machine(device),
            "versions": provenance.versions(),
            "git": provenance.revision(),
            "rows": [],
            "kernel_tests": None,
            "left_out": [],
            "problems": [],
        }

    def leave_out(self, what: str, why: str) -> None:
        """Note what there is no figure for."""
        print(f"left out: {what}: {why}", flush=True)
        self.summary["left_out"].append({"what": what, "why": why})
        self.keep()

    def fail(self, what: str, error: Exception) -> None:
        """Note what there is no figure for because it is wrong or does not run."""
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        self.summary["problems"].append(f"{what}: {why}")
        self.leave_out(what, why)

    def add(self, document: Mapping[str, Any]) -> None:
        """Rows of one document, printed as they come."""
        for row in summary_rows(document):
            print(line(row), flush=True)
            self.summary["rows"].append(row)
        name = document["model"]["name"]
        self.summary["problems"] += [f"{name}, {problem}" for problem in document["problems"]]
        self.keep()

    def keep(self) -> None:
        """Write summary.json."""
        write_document(self.summary, self.directory / "summary.json")


def summary_rows(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A row per cell, slim model and phase of a document of one plan."""
    memory = {record["name"]: record for record in document["memory"]}
    for cell in document["cells"]:
        for row in cell["rows"]:
            for phase in ("prefill", "decode"):
                over = row.get(phase, {}).get("speedup")
                if over:
                    yield {
                        "model": document["model"]["name"],
                        "row": row["name"],
                        "batch": cell["batch"],
                        "context": cell["context"],
                        "phase": phase,
                        "tokens_per_second": row[phase]["tokens_per_second"],
                        **{key: over[key] for key in ("median", "bound", "efficiency")},
                        "above_bound": over["above_bound"],
                        **_bytes(memory.get(row["name"]), cell),
                    }


def _bytes(record: Mapping[str, Any] | None, cell: Mapping[str, Any]) -> dict[str, int]:
    for entry in record["cells"] if record else ():
        if (entry["batch"], entry["context"]) == (cell["batch"], cell["context"]):
            assert record
            held = {"weight_bytes": record["weight_bytes"]}
            return held | {key: entry[key] for key in ("kv_bytes", "peak_bytes")}
    return {}


def line(row: Mapping[str, Any]) -> str:
    """A summary row as text."""
    share = "no gain possible" if row["efficiency"] is None else f"{row['efficiency']:.0%}"
    return (
        f"{row['model']:13} {row['row']:26} {row['batch']:3} x {row['context']:<5} "
        f"{row['phase']:7} {row['tokens_per_second']:10.1f} tok/s {row['median']:6.3f}x of "
        f"{row['bound']:.3f}x {'impossible' if row['above_bound'] else share}"
    )


def cells_of(of: Published, request: BenchRequest, free_bytes: int | None) -> dict[Cell, Timed]:
    """The cells of a shape, and what is timed in each; None bytes means as many as needed.

    Launching from Python matters most with one short text, so eager decoding is timed there;
    prefill is timed where prompts are long enough for figures and short enough for the budget. On
    the CPU, where there are no graphs, both are timed everywhere.
    """
    eager, on_card = Timed(rounds=EAGER_ROUNDS), request.device != "cpu"
    reading = Timed(frozenset({"prefill"}), EAGER_ROUNDS) if on_card else eager
    timed = {
        Cell(1, min(_SHORT, of.context)): eager,
        Cell(1, min(_LONG, of.context)): reading,
    }
    batch = _MANY
    context = min(_MANY_CONTEXT, of.context)
    while batch > 1 and not _fits(of, Cell(batch, context), request, free_bytes):
        batch //= 2
    if batch > 1:
        timed[Cell(batch, context)] = Timed(frozenset()) if on_card else eager
    return timed


def _fits(of: Published, cell: Cell, request: BenchRequest, free_bytes: int | None) -> bool:
    """Whether there is room for the dense model, another one as large, and a cache."""
    if free_bytes is None:
        return True
    shape = of.shape
    weights = 2 * shape.element_bytes * shape.parameters(shape.layers)
    per_token = shape.kv_bytes_per_token(shape.layers)
    cache = cell.batch * (cell.context + request.new_tokens) * per_token
    return weights + cache + _SPARE_BYTES <= free_bytes


def run(task: Task, budget: Time) -> dict[str, Any]:
    """Do as much of a task as the budget allows; return what summary.json holds."""
    outcome = Outcome(task.directory, task.request.device)
    rates = _once(lambda: measure_rates(task.request.device, _dtype(task.request)))
    models = budget.part(1 - _KERNEL_SHARE)
    for index, name in enumerate(task.names):
        share = models.part(1 / (len(task.names) - index))
        try:
            _backbone(task, published(name), share, rates, outcome)
        finally:
            _free(task.request.device)
    _kernels(task, budget, outcome)
    outcome.keep()
    return outcome.summary


def _once(measure: Callable[[], Rates]) -> Callable[[], Rates]:
    """The same rates for every document."""
    kept: list[Rates] = []

    def rates() -> Rates:
        if not kept:
            kept.append(measure())
        return kept[0]

    return rates


def _dtype(request: BenchRequest) -> str:
    return request.dtype or ("float32" if request.device == "cpu" else "bfloat16")


def _free(device: str) -> None:
    gc.collect()
    if device != "cpu":
        import torch

        torch.cuda.empty_cache()


def _free_bytes(device: str) -> int | None:
    if device == "cpu":
        return None
    import torch

    return int(torch.cuda.mem_get_info(device)[0])


def _backbone(
    task: Task, of: Published, budget: Time, rates: Callable[[], Rates], outcome: Outcome
) -> None:
    """All plans for a shape, the dense model made once."""
    request = task.request
    cells = cells_of(of, request, _free_bytes(request.device))
    models: Models | None = None
    slowest = 0.0
    for variant in task.variants:
        what = f"{of.name} {variant.name}"
        try:
            plan = shape_plan(of, variant, request.seed)
        except BudgetError as error:
            outcome.leave_out(what, str(error))
            continue
        results = task.directory / of.name / f"{variant.name}.json"
        shape_run = ShapeRun(of, [plan], request, results=results)
        document = shape_run.open(task.force, rates)
        todo = {cell: timed for cell, timed in cells.items() if not has_cell(document, cell)}
        if todo and budget.left < 1.2 * slowest:
            outcome.leave_out(what, "time")
        elif todo and (models := models or _dense(of, request, cells)) is None:
            outcome.leave_out(what, "memory")
        elif todo and models:
            started = time.monotonic()
            _pair(shape_run, document, models, plan, todo, outcome)
            slowest = max(slowest, time.monotonic() - started)
        outcome.add(document)


def _dense(of: Published, request: BenchRequest, cells: Mapping[Cell, Timed]) -> Models | None:
    """The dense model and room for its cache; None where the card has too little memory."""
    import torch

    try:
        models = Models(of, request.device, _dtype(request), request.seed)
        models.reserve(list(cells), request.new_tokens)
    except torch.OutOfMemoryError:
        return None
    return models


def _pair(
    run: ShapeRun,
    document: dict[str, Any],
    models: Models,
    plan: ShapePlan,
    cells: Mapping[Cell, Timed],
    outcome: Outcome,
) -> None:
    """One plan beside the dense model, in every cell that is missing."""
    import torch

    what = f"{run.of.name} {plan.variant.name}"
    slims, runners = [], list[StaticRunner]()
    try:
        slims.append(models.slim(plan))
        document |= run.check(models, slims)
        runners += run.runners(models, slims)
        for cell, timed in cells.items():
            peaks: dict[str, int] = {}
            run.measure(document, runners, cell, timed, watch=_watch(run, peaks))
            models.note_peaks(cell, peaks)
            _add_memory(run, document, runners, cell, peaks)
            run.keep(document)
    except torch.OutOfMemoryError:
        outcome.leave_out(what, "memory")
    except (ParityError, RuntimeError) as error:  # a capture or a kernel that fails: others may not
        outcome.fail(what, error)
    finally:
        for runner in runners[len(run.engines) :]:
            runner.close()


def _watch(
    run: ShapeRun, peaks: dict[str, int]
) -> Callable[[StaticRunner], AbstractContextManager[None]]:
    device = run.request.device

    def watch(runner: StaticRunner) -> AbstractContextManager[None]:
        return nullcontext() if device == "cpu" else peak_of(device, peaks, runner.name)

    return watch


def _add_memory(
    run: ShapeRun,
    document: dict[str, Any],
    runners: Sequence[StaticRunner],
    cell: Cell,
    peaks: Mapping[str, int],
) -> None:
    """Memory of every row that ran in this cell: weights, cache, and the peak, which adds what a
    turn took."""
    by_name = {candidate.name: candidate for candidate in run.candidates}
    records = {record["name"]: record for record in document["memory"]}
    for runner in runners:
        if runner.name not in peaks:
            continue
        candidate, weights = by_name[runner.name], runner.weight_bytes
        kv = runner.kv_bytes()
        earlier = records.get(runner.name, {"cells": []})["cells"]
        new = {**cell.to_dict(), "kv_bytes": kv, "peak_bytes": weights + kv + peaks[runner.name]}
        plain = [{key: entry[key] for key in new} for entry in earlier]
        held = {
            "weight_bytes": weights,
            "before_bytes": 0,
            "loaded_bytes": weights,
            "loading_peak_bytes": weights,
            "cells": [*plain, new],
        }
        records[runner.name] = with_prediction(candidate, held, run.request.new_tokens)
    document["memory"] = list(records.values())


def _kernels(task: Task, budget: Time, outcome: Outcome) -> None:
    """Tests of what runs only on a card, then the table of ragged attention in both half
    precisions."""
    on_card = task.request.device != "cpu"
    outcome.summary["kernel_tests"] = (
        kernel_tests(min(_PYTEST_SECONDS, 0.4 * budget.left))
        if on_card
        else {"passed": None, "output": "run by make test where there is no card"}
    )
    outcome.keep()
    dtypes = ("bfloat16", "float16") if on_card else ("float32",)
    for index, dtype in enumerate(dtypes):
        share = budget.part(1 / (len(dtypes) - index))
        _ragged(task, dtype, share, outcome)
        _free(task.request.device)


def kernel_tests(seconds: float) -> dict[str, Any]:
    """The outcome of the tests of kernels and graphs on this machine."""
    if find_spec("pytest") is None or not (_ROOT / _TESTS[0]).exists():
        return {"passed": None, "output": "pytest or the tests are not here"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-W",
        "default",
    ]
    try:
        result = subprocess.run(
            [*command, *_TESTS],
            cwd=_ROOT,
            capture_output=True,
            text=True,
            timeout=max(1.0, seconds),
        )
    except subprocess.TimeoutExpired:
        return {"passed": None, "output": f"not done within {seconds:.0f} seconds"}
    last = result.stdout.strip().splitlines()[-5:]
    return {"passed": result.returncode == 0, "output": "\n".join(last)}


def _ragged(task: Task, dtype: str, budget: Time, outcome: Outcome) -> None:
    """The table of `spp_campaigns.ragged`, with as many of its cases as there is time for."""
    import torch

    from spp_campaigns import ragged

    device, path = task.request.device, task.directory / f"ragged-{dtype}.json"
    small = [ragged.Case("decode", 1, 1, 64, "light")]
    todo = small if device == "cpu" else list(ragged.cases("cuda"))
    rates, results = measure_rates(device, dtype), list[dict[str, Any]]()
    facts = {"dtype": dtype, "head_dim": ragged.HEAD_DIM}
    facts |= {"bytes_per_second": round(rates.bytes_per_second)}
    facts |= {"operations_per_second": round(rates.operations_per_second)}
    ways = ragged.ways_on(device)
    slowest = 0.0
    for case in todo:
        what = f"ragged attention, {dtype}, {case.phase}, {case.batch} x {case.context}"
        if budget.left < 1.2 * slowest:
            outcome.leave_out(f"{what}, {case.pattern}, and what follows", "time")
            break
        started = time.monotonic()
        try:
            row = ragged.measure(case, ways, task.request.rounds, device, getattr(torch, dtype))
        except torch.OutOfMemoryError:
            outcome.leave_out(f"{what}, {case.pattern}", "memory")
            continue
        except Exception as error:  # whatever a kernel does on a card is a result
            outcome.fail(f"{what}, {case.pattern}", error)
            continue
        row["bound_ms"] = round(1e3 * rates.seconds(Work(row["bytes"], row["operations"])), 4)
        results.append(row)
        slowest = max(slowest, time.monotonic() - started)
        write_document({**facts, "results": results}, path)
    if results:
        ragged.table(results)
        wrong = ragged.too_fast(results)
        outcome.summary["problems"] += [f"ragged, {dtype}: {problem}" for problem in wrong]


def parser() -> argparse.ArgumentParser:
    """The options; without any but --json, the whole matrix."""
    made = argparse.ArgumentParser(prog="spp_campaigns.gpu", description=__doc__)
    made.add_argument("--json", type=Path, required=True, metavar="DIR", help="results directory")
    made.add_argument("--budget-s", type=float, default=520.0, help="seconds for everything")
    made.add_argument("--device", default="cuda")
    made.add_argument("--dtype", help="bfloat16 on a card by default, float32 on the CPU")
    made.add_argument("--shape", action="append", help="a published model shape; repeatable")
    made.add_argument("--keep", type=float, action="append", help="share of parameters; repeatable")
    made.add_argument("--layout", choices=LAYOUTS, action="append")
    made.add_argument("--units", choices=("heads", "both"), action="append")
    made.add_argument("--rounds", type=int, default=ROUNDS)
    made.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--force", action="store_true", help="replace results of another machine")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 if a figure is impossible, or something is wrong or fails to run; 2 without a card."""
    options = parser().parse_args(arguments)
    budget = Time(options.budget_s)
    request = BenchRequest(
        new_tokens=options.new_tokens,
        rounds=options.rounds,
        device=options.device,
        dtype=options.dtype,
        seed=options.seed,
    )
    try:
        request.check()
        names = tuple(options.shape or BACKBONES)
        for name in names:
            published(name)
        chosen = variants(
            options.keep or KEEPS, options.layout or LAYOUTS, options.units or ("heads", "both")
        )
        summary = run(Task(options.json, request, names, chosen, options.force), budget)
    except SppError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for problem in summary["problems"]:
        print(f"error: {problem}")
    tests = summary["kernel_tests"]
    print(f"kernel tests: {tests['output']}")
    print(f"{len(summary['rows'])} rows, {len(summary['left_out'])} left out, in {options.json}")
    return 1 if summary["problems"] or tests["passed"] is False else 0


if __name__ == "__main__":
    sys.exit(main())

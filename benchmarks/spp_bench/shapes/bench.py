"""Speed and memory of a published shape without its weights: random ones, plans of random scores.

Dense and slim models take turns in one process, as in `bench`; quality is not measured. On a card
every model has two rows: kernels launched from Python, and decoding as a CUDA graph.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spp_bench import provenance
from spp_bench.bench import BenchRequest
from spp_bench.bounds import Rates, Sizes
from spp_bench.candidates import DENSE, Candidate, EngineName, Made
from spp_bench.cases import Cell, tokens
from spp_bench.claims import claim_rows
from spp_bench.device_rates import measure_rates
from spp_bench.gate import check_agreement, distance, rounding_room
from spp_bench.measure import PHASES, Phase, in_turn
from spp_bench.memory import measure_memory
from spp_bench.plots import write_plots
from spp_bench.results import cell_record, earlier, header, problems, write_document
from spp_bench.shapes.measure import Part, Watch, measure_parts
from spp_bench.shapes.plans import ShapePlan, Variant, shape_plan
from spp_bench.shapes.shapes import Published, published
from spp_bench.threads import torch_threads
from spp_export.common.errors import ParityError, UsageError
from spp_export.common.progress import progress

if TYPE_CHECKING:
    from spp_bench.engines.static import Room, StaticRunner

_LABELS: Mapping[EngineName, str] = {"torch": "eager", "graph": "graph"}
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_PROMPT, _STEPS = 16, 4


@dataclass(frozen=True)
class Timed:
    """What is timed in a cell. Decoding as a graph is always timed, in every round.

    phases  of models launched from Python; an empty set leaves these models out
    rounds  in which these models take part; None means all
    """

    phases: frozenset[Phase] = frozenset(PHASES)
    rounds: int | None = None


class Models:
    """The dense model of a shape on a device, and the room for its cache and those of others.

    Runners of the dense model are kept, so that its graphs are captured once.
    """

    def __init__(self, of: Published, device: str, dtype: str, seed: int) -> None:
        import torch

        from spp_bench.engines.static import Room
        from spp_bench.shapes.random_models import random_dense

        self.of = of
        self.dense = random_dense(of, device, getattr(torch, dtype), seed)
        self.room: Room = Room(device, self.dense.dtype)
        self._kept: dict[str, StaticRunner] = {}
        self._peaks: dict[tuple[str, Cell], int] = {}

    def slim(self, plan: ShapePlan) -> Any:
        """The slim model of a plan, which shares what is not cut."""
        from spp_bench.shapes.random_models import slim_of

        return slim_of(self.dense, self.of, plan.plan, plan.config)

    def reserve(self, cells: Sequence[Cell], new_tokens: int) -> None:
        """Room for the largest cache of these cells."""
        shape = self.of.shape
        per_token = shape.kv_bytes_per_token(shape.layers, 1)
        tokens = max(cell.batch * (cell.context + new_tokens) for cell in cells)
        self.room.reserve(per_token * tokens)

    def runner(self, candidate: Candidate, model: Any, room: Room | None = None) -> StaticRunner:
        """A runner of the dense model or a slim one, with its cache in `room` or, without one, in
        ours."""
        from spp_bench.engines.static import StaticRunner
        from spp_bench.graphs import cuda_graph

        capture = cuda_graph if candidate.engine == "graph" else None
        return StaticRunner(candidate.name, model, candidate.sizes, room or self.room, capture)

    def dense_runner(self, candidate: Candidate) -> StaticRunner:
        """The one runner of a dense row."""
        if candidate.name not in self._kept:
            self._kept[candidate.name] = self.runner(candidate, self.dense)
        return self._kept[candidate.name]

    def note_peaks(self, cell: Cell, peaks: dict[str, int]) -> None:
        """Set the dense rows' peaks to those of the cell's first run: once captured, a graph does
        not need that memory again."""
        for name in self._kept:
            if name in peaks:
                peaks[name] = self._peaks.setdefault((name, cell), peaks[name])


class ShapeRun:
    """One results document: a shape, the plans measured for it, and what decides its figures."""

    def __init__(
        self,
        of: Published,
        plans: Sequence[ShapePlan],
        request: BenchRequest,
        *,
        results: Path | None = None,
    ) -> None:
        on_card = request.device != "cpu"
        self.of = of
        self.plans = plans
        self.request = request
        self.results = results
        self.dtype = request.dtype or ("bfloat16" if on_card else "float32")
        self.engines: tuple[EngineName, ...] = ("torch", "graph") if on_card else ("torch",)
        self.threads = request.threads or provenance.physical_cores()
        self.candidates = [
            self._candidate(plan, engine) for plan in (None, *plans) for engine in self.engines
        ]
        model = {
            "name": of.name,
            "fingerprint": of.fingerprint,
            "parameters": of.shape.parameters(of.shape.layers),
        }
        self.header = header(model, request.options(self.dtype, self.threads), self.candidates)

    def open(self, force: bool, rates: Callable[[], Rates]) -> dict[str, Any]:
        """The document of an earlier run like this one, or a new one."""
        before = self.results and earlier(self.results, self.header, force)
        if before:
            return before
        return {
            **self.header,
            "rates": rates().to_dict(),
            **{key: [] for key in ("gate", "agreement", "memory", "cells", "claims", "problems")},
        }

    def check(self, models: Models, slims: Sequence[Any]) -> dict[str, Any]:
        """`gate` and `agreement` of the document: that slim models compute what the masked dense
        one does, and graphs what their kernels compute when launched one by one. Raises
        ParityError."""
        from spp_bench.engines.static import Room

        gate = [
            self._check_masked(models, plan, slim)
            for plan, slim in zip(self.plans, slims, strict=True)
        ]
        runners = [
            models.runner(candidate, model, Room(self.request.device, models.dense.dtype))
            for candidate, model in self._with_models(models, slims)
        ]
        by_name = {candidate.name: candidate for candidate in self.candidates}
        vocab = self.of.shape.vocab_size
        return {"gate": gate, "agreement": check_agreement(runners, by_name, vocab, _STEPS)}

    def runners(self, models: Models, slims: Sequence[Any]) -> list[StaticRunner]:
        """One per row."""
        return [
            models.dense_runner(candidate) if candidate.dense else models.runner(candidate, model)
            for candidate, model in self._with_models(models, slims)
        ]

    def measure(
        self,
        document: dict[str, Any],
        runners: Sequence[StaticRunner],
        cell: Cell,
        timed: Timed,
        *,
        advance: Callable[[], None] = lambda: None,
        watch: Watch | None = None,
    ) -> None:
        """Add a cell to the document."""
        rounds = self.request.rounds
        eager = rounds if timed.rounds is None else min(rounds, timed.rounds)
        engine = {candidate.name: candidate.engine for candidate in self.candidates}
        parts = [
            Part(runner, frozenset[Phase]({"decode"}), rounds)
            if engine[runner.name] == "graph"
            else Part(runner, timed.phases, eager)
            for runner in runners
            if engine[runner.name] == "graph" or timed.phases
        ]
        fed = tokens(cell, self.request.new_tokens, self.of.shape.vocab_size, self.request.seed)
        options = {} if watch is None else {"watch": watch}
        samples = measure_parts(parts, fed, advance, **options)
        rates = Rates(**document["rates"])
        record = cell_record(cell, self.candidates, samples, rates, self.request.new_tokens)
        document["cells"] = sorted(
            [*document["cells"], record], key=lambda entry: (entry["batch"], entry["context"])
        )

    def keep(self, document: dict[str, Any]) -> None:
        """Note what is wrong with the document, and write it."""
        document["problems"] = problems(document)
        if self.results:
            write_document(document, self.results)

    def _with_models(self, models: Models, slims: Sequence[Any]) -> Iterator[tuple[Candidate, Any]]:
        of_engines = [model for model in (models.dense, *slims) for _ in self.engines]
        yield from zip(self.candidates, of_engines, strict=True)

    def _candidate(self, plan: ShapePlan | None, engine: EngineName) -> Candidate:
        shape, label, size = self.of.shape, _LABELS[engine], _BYTES[self.dtype]
        layers = plan.layers(self.of) if plan else shape.layers
        windows = (None,) * shape.num_layers
        config = plan.config if plan else self.of.config
        return Candidate(
            name=f"{plan.variant.name if plan else DENSE} {label}",
            engine=engine,
            directory=Path(),
            sizes=Sizes(
                shape, layers, windows, size * shape.decode_parameters(layers), size, False
            ),
            precision=self.dtype,
            baseline=f"{DENSE} {label}" if plan else None,
            plan_hash=_hash(plan) if plan else None,
            predicted_bytes=size * shape.parameters(layers),
            made=Made(self.of.name, config, self.request.seed, plan.to_dict() if plan else None),
        )

    def _check_masked(self, models: Models, plan: ShapePlan, slim: Any) -> dict[str, Any]:
        """The logits of a slim model beside those of the dense one without the same units."""
        import torch

        from spp_export.evaluation.oracle import masked_dense

        row = next(candidate for candidate in self.candidates if candidate.plan_hash == _hash(plan))
        fed = tokens(Cell(1, _PROMPT), 1, self.of.shape.vocab_size, self.request.seed).prompt
        ids = torch.from_numpy(fed).to(models.dense.device)
        with torch.inference_mode():
            slim_logits = slim(input_ids=ids, use_cache=False).logits
            with masked_dense(models.dense, self.of.family, self.of.shape, plan.plan) as masked:
                expected = masked(input_ids=ids, use_cache=False).logits
        apart = distance(*(logits.float().cpu().numpy() for logits in (slim_logits, expected)))
        limit = rounding_room(row)
        if not apart <= limit:
            raise ParityError(
                f"{plan.variant.name}: its logits differ from those of the masked dense model by "
                f"{apart:.2g} of their length, at most {limit:g} is rounding."
            )
        checks = [{"name": "masked dense", "distance": apart, "limit": limit}]
        return {"name": plan.variant.name, "manifest": None, "checks": checks}


def _hash(plan: ShapePlan) -> str:
    return hashlib.sha256(plan.plan.to_json().encode()).hexdigest()


def bench_shape(
    name: str,
    requested: Sequence[Variant],
    *,
    request: BenchRequest | None = None,
    results: Path | None = None,
    plots: Path | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Measure plans for a shape beside the dense model; the document of `spp_bench.schema`.

    Otherwise as `bench`: cells that `results` has are not measured again, and no figure is given
    for a slim model that does not compute what the masked dense one does.
    """
    request = request or BenchRequest()
    cells, of = request.check(), published(name)
    if not requested:
        raise UsageError(f"--shape {name}: nothing to measure. Give --keep.")
    plans = [shape_plan(of, variant, request.seed) for variant in requested]
    with torch_threads(request.threads or provenance.physical_cores()):
        run = ShapeRun(of, plans, request, results=results)
        document = _measured(run, cells, force)
    if plots:
        write_plots(document, plots)
    return document


def _measured(run: ShapeRun, cells: Sequence[Cell], force: bool) -> dict[str, Any]:
    with progress("measuring the device", None):
        document = run.open(force, lambda: measure_rates(run.request.device, run.dtype))
    if run.request.memory:
        _memory(run, document, cells)
    todo = [cell for cell in cells if not has_cell(document, cell)]
    if todo:
        with progress("making the models", None):
            models = Models(run.of, run.request.device, run.dtype, run.request.seed)
            slims = [models.slim(plan) for plan in run.plans]
            document |= run.check(models, slims)
        _cells(run, document, models, slims, todo)
    document["claims"] = claim_rows(document, run.of.shape)
    run.keep(document)
    return document


def _cells(
    run: ShapeRun,
    document: dict[str, Any],
    models: Models,
    slims: Sequence[Any],
    cells: Sequence[Cell],
) -> None:
    models.reserve(cells, run.request.new_tokens)
    runners = run.runners(models, slims)
    new_tokens, rounds = run.request.new_tokens, run.request.rounds
    for cell, advance in in_turn(cells, new_tokens, rounds, len(runners)):
        run.measure(document, runners, cell, Timed(), advance=advance)
        run.keep(document)


def _memory(run: ShapeRun, document: dict[str, Any], cells: Sequence[Cell]) -> None:
    """Memory of every model in a fresh process; graphs need no row of their own, for they use the
    same weights."""
    done = {record["name"]: record for record in document["memory"]}
    rows = [candidate for candidate in run.candidates if candidate.engine == "torch"]
    with progress("memory, a process each", float(len(rows))) as advance_to:
        for index, candidate in enumerate(rows):
            measured = done.get(candidate.name, {"cells": ()})["cells"]
            known = {Cell(entry["batch"], entry["context"]) for entry in measured}
            if not known >= set(cells):
                done[candidate.name] = measure_memory(
                    candidate,
                    sorted(known | set(cells)),
                    run.request.new_tokens,
                    run.request.device,
                    run.threads,
                )
            advance_to(index + 1.0)
    document["memory"] = [done[candidate.name] for candidate in rows]
    run.keep(document)


def has_cell(document: Mapping[str, Any], cell: Cell) -> bool:
    """Whether a document has this cell's figures."""
    return cell.to_dict() in [
        {key: record[key] for key in cell.to_dict()} for record in document["cells"]
    ]


@contextmanager
def peak_of(device: str, peaks: dict[str, int], name: str) -> Iterator[None]:
    """Note the most bytes that PyTorch held on a card beyond what it held at the start."""
    import torch

    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield
    peaks[name] = torch.cuda.max_memory_allocated(device) - before

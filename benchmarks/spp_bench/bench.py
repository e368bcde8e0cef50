"""`bench`: dense and slim models side by side in one process, once they are known to be right."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spp_bench import provenance
from spp_bench.bounds import Rates
from spp_bench.candidates import (
    Candidate,
    Form,
    Out,
    gguf_candidate,
    in_genai,
    onnx_candidate,
    read_out,
    torch_candidate,
    windows_of,
)
from spp_bench.cases import Cell, check_counts, check_device, grid, tokens
from spp_bench.claims import claim_rows
from spp_bench.device_rates import measure_rates
from spp_bench.engines.open import genai_installed, open_runner
from spp_bench.engines.runner import Runner
from spp_bench.gate import check_agreement, check_outs, same_files
from spp_bench.measure import in_turn, measure_cell
from spp_bench.memory import measure_memory
from spp_bench.plots import write_plots
from spp_bench.results import cell_record, earlier, header, problems, write_document
from spp_bench.threads import torch_threads
from spp_export.common.errors import OutputError, UsageError
from spp_export.common.installation import install_command
from spp_export.common.progress import progress
from spp_export.formats.gguf.llama_cpp import is_installed as llama_installed
from spp_export.formats.gguf.options import GgufOptions
from spp_export.models.checkpoint.checkpoint import Checkpoint, open_source
from spp_export.models.hub import DEMO, cache_directory, locate_model


@dataclass(frozen=True)
class BenchRequest:
    """What to measure. `threads` None means every physical core; `dtype` None means float32 on the
    CPU and the stored dtype elsewhere; `rounds` counts the timed rounds, without the one that
    warms up."""

    batches: tuple[int, ...] = (1,)
    contexts: tuple[int, ...] = (128,)
    new_tokens: int = 32
    rounds: int = 9
    threads: int | None = None
    device: str = "cpu"
    dtype: str | None = None
    memory: bool = True
    genai: bool = True
    seed: int = 0

    def check(self) -> tuple[Cell, ...]:
        """The grid. UsageError for an option that makes no sense."""
        counts = {"--new-tokens": self.new_tokens, "--rounds": self.rounds}
        check_counts({**counts, "--threads": self.threads})
        check_device(self.device, self.dtype)
        return grid(self.batches, self.contexts)

    def options(self, dtype: str, threads: int) -> dict[str, Any]:
        """What decides the figures of a cell, for the results file."""
        return {
            "device": self.device,
            "dtype": dtype,
            "threads": threads,
            "rounds": self.rounds,
            "new_tokens": self.new_tokens,
            "seed": self.seed,
        }


def bench(
    outs: Sequence[str | os.PathLike[str]],
    *,
    model: str = DEMO,
    request: BenchRequest | None = None,
    results: Path | None = None,
    plots: Path | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Measure directories beside the dense model; the document of `spp_bench.schema`.

    With `results` the document is kept in that file, and cells already in it are not measured
    again; curves go to the directory `plots`. The document's `problems` say what makes the run
    fail. Raises ParityError, before any figure, for a model that does not compute what it should.
    """
    request = request or BenchRequest()
    cells = request.check()
    location = locate_model(model)
    source = open_source(location.path, location.name)
    directories = _read_outs(outs, source)
    _check_llama(directories, request.device)
    dtype = request.dtype or ("float32" if request.device == "cpu" else source.dtype_name)
    threads = request.threads or provenance.physical_cores()
    with (
        torch_threads(threads),
        _candidates(directories, source, dtype, request.genai) as candidates,
    ):
        run = _Run(request, source, directories, candidates, dtype, threads, results)
        document = run.measure(cells, model, force)
    if plots:
        write_plots(document, plots)
    return document


def _read_outs(outs: Sequence[str | os.PathLike[str]], source: Checkpoint) -> list[Out]:
    directories = [read_out(Path(out), source) for out in outs]
    names = [out.name for out in directories]
    if not directories or len(set(names)) < len(names):
        raise UsageError(f"{', '.join(names) or 'nothing'}: expected directories of unlike names.")
    return directories


def _check_llama(outs: Sequence[Out], device: str) -> None:
    """UsageError where GGUF directories cannot be measured."""
    files = [out for out in outs if isinstance(out.form, GgufOptions)]
    if files and device != "cpu":
        raise UsageError(
            f"{files[0].name}: GGUF runs on the CPU here. Drop --device {device}, or the directory."
        )
    if files and not llama_installed():
        raise UsageError(
            f"{files[0].name}: measuring GGUF needs the package xllamacpp. "
            f"Run: {install_command('gguf')}"
        )


@contextmanager
def _candidates(
    outs: Sequence[Out], source: Checkpoint, dtype: str, genai: bool
) -> Iterator[list[Candidate]]:
    """All rows, engine by engine and dense ones first; the dense models' ONNX graphs and GGUF files
    exist as long as the context is open."""
    windows = windows_of(source)
    rows = [torch_candidate(source, None, dtype, windows)]
    rows += [torch_candidate(source, out, dtype, windows) for out in outs if out.form is None]
    written = [(out, out.form) for out in outs if out.form is not None]
    if not written:
        yield rows
        return
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="bench-") as scratch:
        made = []
        for index, form in enumerate(dict.fromkeys(form for _, form in written)):
            directory = Path(scratch) / str(index)
            _write_dense(source, directory, form)
            made.append(_written_candidate(source, None, form, directory, windows))
        made += [
            _written_candidate(source, out, form, out.directory, windows) for out, form in written
        ]
        graphs = [row for row in made if row.engine == "onnx"]
        rows += graphs
        if genai and genai_installed():
            rows += map(in_genai, graphs)
        yield rows + [row for row in made if row.engine == "gguf"]


def _written_candidate(
    source: Checkpoint,
    out: Out | None,
    form: Form,
    directory: Path,
    windows: Sequence[int | None],
) -> Candidate:
    if isinstance(form, GgufOptions):
        return gguf_candidate(source, out, form, directory, windows)
    return onnx_candidate(source, out, form, directory, windows)


def _write_dense(source: Checkpoint, directory: Path, form: Form) -> None:
    """The dense model as ONNX or GGUF, written like the directories it is compared with."""
    from spp_export.formats.gguf.contents import gguf_contents
    from spp_export.formats.gguf.write import write_gguf
    from spp_export.formats.onnx.write import write_onnx

    directory.mkdir()
    title = "GGUF" if isinstance(form, GgufOptions) else "ONNX"
    with progress(f"exporting the dense model to {title}", 1.0) as advance_to:

        def advance(done: int, total: int) -> None:
            advance_to(done / max(total, 1))

        if isinstance(form, GgufOptions):
            contents = gguf_contents(source, form, source.name)
            write_gguf(source, contents, directory, progress=advance)
        else:
            write_onnx(source.path, directory, form, progress=advance)


class _Run:
    """One run. Its header decides which cells of an earlier run may be kept."""

    def __init__(
        self,
        request: BenchRequest,
        source: Checkpoint,
        outs: Sequence[Out],
        candidates: Sequence[Candidate],
        dtype: str,
        threads: int,
        results: Path | None,
    ) -> None:
        self.request = request
        self.source = source
        self.outs = outs
        self.candidates = candidates
        self.threads = threads
        self.results = results
        model = {
            "name": source.name,
            "fingerprint": source.fingerprint,
            "parameters": source.shape.parameters(source.shape.layers),
        }
        self.header = header(model, request.options(dtype, threads), candidates)

    def measure(self, cells: Sequence[Cell], model: str, force: bool) -> dict[str, Any]:
        """Measure everything that no earlier run has; return the whole document."""
        before = self.results and earlier(self.results, self.header, force)
        if before and not same_files(before["gate"], self.outs):
            if not force:
                raise OutputError(
                    f"{self.results}: measured of other files in directories of these names. "
                    "Choose another file, or use --force."
                )
            before = None
        document = before or self._begin(model)
        todo = [cell for cell in cells if not _has(document["cells"], cell)]
        self._memory(document, cells)
        if todo:
            self._cells(document, todo)
        document["claims"] = claim_rows(document, self.source.shape, demo=model == DEMO)
        self._keep(document)
        return document

    def _begin(self, model: str) -> dict[str, Any]:
        options = self.header["options"]
        gate = check_outs(self.outs, model, self.request.device, self.request.dtype)
        with progress("measuring the device", None):
            rates = measure_rates(self.request.device, options["dtype"])
        return {
            **self.header,
            "rates": rates.to_dict(),
            "gate": gate,
            **{key: [] for key in ("agreement", "memory", "cells", "claims", "problems")},
        }

    def _memory(self, document: dict[str, Any], cells: Sequence[Cell]) -> None:
        """Measure memory. Called before this process loads a model, so that there is room for
        each."""
        if not self.request.memory:
            return
        done = {record["name"]: record for record in document["memory"]}
        todo = [
            candidate
            for candidate in self.candidates
            if candidate.name not in done
            or not all(_has(done[candidate.name]["cells"], cell) for cell in cells)
        ]
        with progress("memory, a process each", float(len(todo) or 1)) as advance_to:
            for index, candidate in enumerate(todo):
                earlier_cells = done.get(candidate.name, {}).get("cells", ())
                requested = {*cells, *(Cell(c["batch"], c["context"]) for c in earlier_cells)}
                done[candidate.name] = measure_memory(
                    candidate,
                    sorted(requested),
                    self.request.new_tokens,
                    self.request.device,
                    self.threads,
                )
                advance_to(index + 1.0)
        document["memory"] = [done[candidate.name] for candidate in self.candidates]
        self._keep(document)

    def _cells(self, document: dict[str, Any], cells: Sequence[Cell]) -> None:
        rates = Rates(**document["rates"])
        runners = self._open()
        by_name = {candidate.name: candidate for candidate in self.candidates}
        vocab = self.source.shape.vocab_size
        with progress("comparing logits", None):
            document["agreement"] = check_agreement(runners, by_name, vocab)
        new_tokens, rounds = self.request.new_tokens, self.request.rounds
        turns = in_turn(cells, new_tokens, rounds, len(runners))
        for cell, advance in turns:
            fed = tokens(cell, new_tokens, vocab, self.request.seed)
            samples = measure_cell(runners, fed, rounds, advance)
            record = cell_record(cell, self.candidates, samples, rates, new_tokens)
            document["cells"] = sorted([*document["cells"], record], key=_order)
            self._keep(document)

    def _open(self) -> list[Runner]:
        runners = []
        with progress("loading the models", float(len(self.candidates))) as advance_to:
            for index, candidate in enumerate(self.candidates):
                runners.append(open_runner(candidate, self.request.device, self.threads))
                advance_to(index + 1.0)
        return runners

    def _keep(self, document: dict[str, Any]) -> None:
        document["problems"] = problems(document)
        if self.results:
            write_document(document, self.results)


def _order(record: Mapping[str, Any]) -> tuple[int, int]:
    return record["batch"], record["context"]


def _has(records: Sequence[Mapping[str, Any]], cell: Cell) -> bool:
    return (cell.batch, cell.context) in map(_order, records)

"""The results document: what a run measured, and which cells of an earlier run may be kept.

`benchmarks/README.md` says what every field means; `spp_bench.schema` checks them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spp_bench import provenance
from spp_bench.bounds import Bound, Rates, Work, bound
from spp_bench.candidates import Candidate
from spp_bench.cases import Cell
from spp_bench.measure import PHASES, Phase, Samples, Speedup, speedup
from spp_bench.schema import check
from spp_bench.timing import quantiles
from spp_export.common.disk import publish_file
from spp_export.common.errors import OutputError
from spp_export.common.json_files import dump_json, read_json

SCHEMA_VERSION = 1
# What must be the same before a cell of an earlier run may stand beside one of this run.
IDENTITY = ("schema_version", "machine", "versions", "git", "model", "options", "candidates")


def header(
    model: Mapping[str, Any], options: Mapping[str, Any], candidates: Sequence[Candidate]
) -> dict[str, Any]:
    """What a document begins with: where its figures come from, under the names in `IDENTITY`."""
    return {
        "schema_version": SCHEMA_VERSION,
        "machine": provenance.machine(options["device"]),
        "versions": provenance.versions(),
        "git": provenance.revision(),
        "model": dict(model),
        "options": dict(options),
        "candidates": [candidate.to_dict() for candidate in candidates],
    }


def cell_record(
    cell: Cell,
    candidates: Sequence[Candidate],
    samples: Mapping[str, Samples],
    rates: Rates,
    new_tokens: int,
) -> dict[str, Any]:
    """All rows of a cell that have samples: times, rates, and speed-ups beside their bounds."""
    figures = _Figures(cell, {c.name: c for c in candidates}, samples, rates, new_tokens)
    timed = (candidate for candidate in candidates if candidate.name in samples)
    return {**cell.to_dict(), "rows": [figures.row(candidate) for candidate in timed]}


@dataclass(frozen=True)
class _Figures:
    """What follows from the samples of a cell."""

    cell: Cell
    candidates: Mapping[str, Candidate]
    samples: Mapping[str, Samples]
    rates: Rates
    new_tokens: int

    def row(self, candidate: Candidate) -> dict[str, Any]:
        """The phases of one candidate that were timed."""
        return {
            "name": candidate.name,
            **{
                phase: self._phase(candidate, phase)
                for phase in PHASES
                if self._timed(candidate, phase)
            },
        }

    def _timed(self, candidate: Candidate, phase: Phase) -> bool:
        samples = self.samples.get(candidate.name)
        return samples is not None and bool(samples.of(phase))

    def _phase(self, candidate: Candidate, phase: Phase) -> dict[str, Any]:
        record = self._times(candidate, phase)
        if candidate.baseline:
            record["speedup"] = self._speedup(self.candidates[candidate.baseline], candidate, phase)
        reference = next(
            (c for c in self.candidates.values() if c.dense and c.engine == "torch"), candidate
        )
        if reference != candidate and self._timed(reference, phase):
            record["over_dense_torch"] = round(self._over(reference, candidate, phase).median, 4)
        return record

    def _times(self, candidate: Candidate, phase: Phase) -> dict[str, Any]:
        samples = [1e3 * seconds for seconds in self.samples[candidate.name].of(phase)]
        times = quantiles(samples, "ms")
        median = float(np.median(samples)) / 1e3
        work = self._work(candidate, phase)
        tokens = self.cell.batch * (self.cell.context if phase == "prefill" else 1)
        return {
            **times,
            "samples_ms": [round(value, 4) for value in samples],
            "tokens_per_second": round(tokens / median, 2),
            "bytes_per_second": round(work.bytes / median),
            "of_bandwidth": round(work.bytes / median / self.rates.bytes_per_second, 4),
            "operations_per_second": round(work.operations / median),
            "of_rate": round(work.operations / median / self.rates.operations_per_second, 4),
        }

    def _speedup(self, dense: Candidate, slim: Candidate, phase: Phase) -> dict[str, Any]:
        ratio = self._over(dense, slim, phase)
        limit: Bound = bound(self._work(dense, phase), self._work(slim, phase), self.rates)
        efficiency = limit.efficiency(ratio.median)
        return {
            **{
                name: None if value is None else round(value, 4)
                for name, value in asdict(ratio).items()
            },
            "bound": round(limit.value, 4),
            "ceiling": round(limit.ceiling, 4),
            "term": limit.term,
            "efficiency": None if efficiency is None else round(efficiency, 3),
            "above_bound": ratio.low is not None and limit.exceeded(ratio.low),
        }

    def _over(self, slow: Candidate, fast: Candidate, phase: Phase) -> Speedup:
        pair = [self.samples[candidate.name].of(phase) for candidate in (slow, fast)]
        # Both began in the first round; one may have been timed in fewer.
        rounds = min(map(len, pair))
        return speedup(*(samples[:rounds] for samples in pair))

    def _work(self, candidate: Candidate, phase: Phase) -> Work:
        if phase == "prefill":
            return candidate.sizes.prefill(self.cell)
        return candidate.sizes.decode(self.cell, self.new_tokens)


def problems(document: Mapping[str, Any]) -> list[str]:
    """Why a run failed, one line each: speed-ups above the bound, memory off the prediction."""
    lines = []
    for cell in document["cells"]:
        for row in cell["rows"]:
            for phase in PHASES:
                over = row.get(phase, {}).get("speedup")
                if over and over["above_bound"]:
                    lines.append(
                        f"{row['name']}, {phase}, batch {cell['batch']}, context "
                        f"{cell['context']}: {over['median']:.3f}x (at least {over['low']:.3f}x) "
                        f"is above the bound of {over['ceiling']:.3f}x, a measurement error"
                    )
    for record in document["memory"]:
        lines += [f"{record['name']}: {problem}" for problem in record["problems"]]
    return lines


def earlier(path: Path, header: Mapping[str, Any], force: bool) -> dict[str, Any] | None:
    """A results file of the same machine, models and options to go on with; None if there is none.

    Raises OutputError for a file that differs in these, unless it may be replaced.
    """
    if not path.exists():
        return None
    document = read_json(path, what="results", error=OutputError)
    try:
        check(document)
        # The same values, as they look after being written and read back.
        now = json.loads(json.dumps(header))
        different = [key for key in IDENTITY if document[key] != now[key]]
    except ValueError as error:
        different = [str(error)]
    if not different:
        return dict(document)
    if force:
        return None
    raise OutputError(
        f"{path}: measured with other {different[0]}, so its cells cannot stand beside new ones. "
        "Choose another file, or use --force."
    )


def write_document(document: Mapping[str, Any], path: Path) -> None:
    """Write the results in one step, so that an interrupted run leaves a whole file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}).") from error
    publish_file(path, dump_json(document), force=True)

"""Results of `spp bench` as a part of a report: speed-ups beside their bounds, and memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spp_export.commands.report.charts import Chart, Series
from spp_export.commands.report.files import mapping, number, text
from spp_export.commands.report.page.figures import TIMES, byte_size, figure, percent, times
from spp_export.common.errors import UsageError
from spp_export.common.json_files import read_json
from spp_export.common.plots import Point

PHASES = ("decode", "prefill")


@dataclass(frozen=True)
class Timing:
    """One speed-up: of a candidate over its dense baseline, in one phase at one size.

    efficiency: how much of the gain that is possible was reached; None where none is possible.
    """

    name: str
    phase: str
    batch: int
    context: int
    dense_ms: float
    slim_ms: float
    median: float
    low: float
    high: float
    bound: float
    efficiency: float | None

    @property
    def gain(self) -> str:
        """How much of the possible gain was reached, in words."""
        if self.efficiency is None:
            return "no gain possible"
        return percent(self.efficiency) if self.efficiency >= 0 else "none"


@dataclass(frozen=True)
class Memory:
    """What one candidate took at one size, in bytes."""

    name: str
    batch: int
    context: int
    weights: float
    cache: float
    peak: float


@dataclass(frozen=True)
class Spread:
    """Speed-ups at one batch and one context on a common axis from `low` to `high`."""

    timings: Sequence[Timing]

    @property
    def title(self) -> str:
        """Phase, batch and context."""
        first = self.timings[0]
        return f"{first.phase.capitalize()}, batch {first.batch:,}, context {first.context:,}"

    @property
    def low(self) -> float:
        """The least value of the axis; 1, the dense model, lies on it."""
        return min(1.0, *(min(timing.low, timing.bound) for timing in self.timings))

    @property
    def high(self) -> float:
        """The greatest value of the axis."""
        return max(1.0, *(max(timing.high, timing.bound) for timing in self.timings))

    def at(self, value: float) -> str:
        """Where a value lies between the ends of the axis, as SVG has it."""
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return f"{2 + 96 * share:.2f}%"


@dataclass(frozen=True)
class Benchmark:
    """Measured speed as `spreads` where there is one context, else as charts over it; memory."""

    timings: Sequence[Timing]
    memory: Sequence[Memory]
    spreads: Sequence[Spread]
    charts: Sequence[Chart]
    note: str
    problems: Sequence[str]

    @property
    def times(self) -> list[tuple[str, ...]]:
        """Rows of a table: model, phase, batch, context, dense, slim, speed-up, bound, gain."""
        return [
            (
                t.name,
                t.phase,
                f"{t.batch:,}",
                f"{t.context:,}",
                f"{figure(t.dense_ms)} ms",
                f"{figure(t.slim_ms)} ms",
                times(t.median),
                times(t.bound),
                t.gain,
            )
            for t in self.timings
        ]

    @property
    def sizes(self) -> list[tuple[str, ...]]:
        """Rows of a table: model, batch, context, weights, KV cache, peak of the process."""
        return [
            (
                cell.name,
                f"{cell.batch:,}",
                f"{cell.context:,}",
                *(byte_size(size) for size in (cell.weights, cell.cache, cell.peak)),
            )
            for cell in self.memory
        ]

    def decode_of(self, name: str) -> Timing | None:
        """The decode speed-up of the export of this name, which a headline may show."""
        timings = (timing for spread in self.spreads for timing in spread.timings)
        named = (timing for timing in timings if timing.name.startswith(f"{name} "))
        return next((timing for timing in named if timing.phase == "decode"), None)


def benchmark_part(path: Path, plan_hash: str) -> Benchmark:
    """What a results file holds on this plan.

    Raises UsageError for a file that is no such results, or holds none of the plan.
    """
    document = read_json(path, what="results", error=UsageError)
    try:
        baselines = {
            str(candidate["name"]): str(candidate["baseline"])
            for candidate in document["candidates"]
            if candidate["plan_hash"] == plan_hash
        }
        timings = list(_timings(document, baselines))
        memory = list(_memory(document, {*baselines, *baselines.values()}))
        note, problems = _note(document), [text(problem) for problem in document["problems"]]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UsageError(f"results {path}: expected what 'spp bench -o FILE' writes.") from None
    if not baselines:
        raise UsageError(
            f"results {path}: hold no measurement of this plan, whose SHA-256 begins "
            f"{plan_hash[:16]}. Measure it with 'spp bench OUT -o FILE'."
        )
    charts: list[Chart] = []
    spreads: list[Spread] = []
    for batch in sorted({timing.batch for timing in timings}):
        for phase in PHASES:
            these = [t for t in timings if (t.batch, t.phase) == (batch, phase)]
            if len({timing.context for timing in these}) > 1:
                charts.append(_speed_chart(phase, batch, these))
            elif these:
                spreads.append(Spread(these))
        charts += _memory_chart([cell for cell in memory if cell.batch == batch], baselines, batch)
    return Benchmark(timings, memory, spreads, charts, note, problems)


def _timings(document: Mapping[str, Any], baselines: Mapping[str, str]) -> Iterator[Timing]:
    for cell in document["cells"]:
        rows = {row["name"]: row for row in cell["rows"]}
        for name in (name for name in baselines if name in rows):
            for phase in (phase for phase in PHASES if "speedup" in rows[name].get(phase, {})):
                slim, dense = rows[name][phase], rows[baselines[name]][phase]
                speedup = slim["speedup"]
                yield Timing(
                    name,
                    phase,
                    _whole(cell["batch"]),
                    _whole(cell["context"]),
                    dense_ms=_number(dense["median_ms"]),
                    slim_ms=_number(slim["median_ms"]),
                    median=_number(speedup["median"]),
                    low=_number(speedup["p20"]),
                    high=_number(speedup["p80"]),
                    bound=_number(speedup["bound"]),
                    efficiency=number(speedup["efficiency"]),
                )


def _memory(document: Mapping[str, Any], names: set[str]) -> Iterator[Memory]:
    for record in document["memory"]:
        for cell in record["cells"] if record["name"] in names else ():
            yield Memory(
                str(record["name"]),
                _whole(cell["batch"]),
                _whole(cell["context"]),
                _number(record["weight_bytes"]),
                _number(cell["kv_bytes"]),
                max(_number(cell["peak_bytes"]) - _number(record["before_bytes"]), 0.0),
            )


def _number(value: Any) -> float:
    known = number(value)
    if known is None or known < 0:
        raise ValueError
    return known


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 < value < 1 << 32:
        raise ValueError
    return value


def _speed_chart(phase: str, batch: int, timings: Sequence[Timing]) -> Chart:
    series = []
    for hue, name in enumerate(dict.fromkeys(timing.name for timing in timings)):
        these = sorted((t for t in timings if t.name == name), key=lambda t: t.context)
        measured = [Point(t.context, t.median, t.low, t.high) for t in these]
        bounds = [Point(t.context, t.bound) for t in these]
        series += [
            Series(name, measured, "main", hue),
            Series(f"{name}: bound", bounds, "bound", hue),
        ]
    return Chart(
        f"{phase.capitalize()}, batch {batch}",
        "speed-up over dense; bands are the 20th to 80th percentile",
        series,
        TIMES,
        dashed="bound: the best possible",
    )


def _memory_chart(
    memory: Sequence[Memory], baselines: Mapping[str, str], batch: int
) -> Iterator[Chart]:
    """Weights and cache in MB over context, where there are several contexts."""
    points: dict[str, list[Point]] = {}
    for cell in sorted(memory, key=lambda cell: cell.context):
        total = (cell.weights + cell.cache) / 1e6
        points.setdefault(cell.name, []).append(Point(cell.context, total))
    series: list[Series] = []
    for hue, (name, dense) in enumerate(baselines.items()):
        if len(points.get(name, ())) > 1:
            series.append(Series(dense, points.get(dense, ()), "bound", hue))
            series.append(Series(name, points[name], "main", hue))
    if series:
        dashed = "the dense model in the same engine"
        title = f"Memory, batch {batch}"
        yield Chart(title, "weights and KV cache, MB", series, " MB", ratio=False, dashed=dashed)


def _note(document: Mapping[str, Any]) -> str:
    machine, options = mapping(document["machine"]), mapping(document["options"])
    name = text(machine.get("gpu")) or text(machine.get("cpu")) or "an unnamed machine"
    versions = mapping(document["versions"])
    torch = f", torch {text(versions.get('torch'))}" if versions.get("torch") else ""
    return (
        f"Measured on {name}, {text(options['device'])}, {text(options['dtype'])}, "
        f"{text(options['threads'])} threads{torch}: medians of {text(options['rounds'])} "
        "rounds in which the models take turns. The bound is the most that fewer bytes and "
        "operations can give; of the gain says how much of it was reached."
    )

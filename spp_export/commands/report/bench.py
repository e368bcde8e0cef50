"""Results of `spp bench` as a part of a report: speed-ups beside their bounds, and memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spp_export.commands.report.files import mapping, number, text
from spp_export.commands.report.page import Benchmark, Chart, Point, Series, Spread, Table
from spp_export.commands.report.page.figures import TIMES, byte_size, count, figure, percent, times
from spp_export.common.errors import UsageError
from spp_export.common.json_files import read_json

PHASES = ("decode", "prefill")
_TIMES = ("model", "phase", "batch", "context", "dense", "slim", "speed-up", "bound", "of the gain")
_MEMORY = ("model", "batch", "context", "weights", "KV cache", "peak of the process")


@dataclass(frozen=True)
class _Timing:
    """One speed-up: of a candidate over its dense baseline, in one phase at one size."""

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


def benchmark_part(path: Path, plan_hash: str) -> Benchmark:
    """What a results file measured of this very plan.

    Raises UsageError for a file that is no such results, or holds none of the plan.
    """
    document = read_json(path, what="results", error=UsageError)
    try:
        names = _names(document, plan_hash)
        timings = list(_timings(document, names))
        part = _part(document, names, timings)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UsageError(f"results {path}: expected what 'spp bench -o FILE' writes.") from None
    if not names:
        raise UsageError(
            f"results {path}: hold no measurement of this plan, whose SHA-256 begins "
            f"{plan_hash[:16]}. Measure it with 'spp bench OUT -o FILE'."
        )
    return part


def decode_of(part: Benchmark, name: str) -> Spread | None:
    """The decode speed-up of the export of this name, which a headline may show."""
    rows = [row for title, spread in part.spreads if title.startswith("Decode") for row in spread]
    return next((row for row in rows if row.label.startswith(f"{name} ")), None)


def _names(document: Mapping[str, Any], plan_hash: str) -> list[str]:
    """Candidates made from this plan, in order."""
    return [str(one["name"]) for one in document["candidates"] if one["plan_hash"] == plan_hash]


def _timings(document: Mapping[str, Any], names: Sequence[str]) -> Iterator[_Timing]:
    baselines = {one["name"]: one["baseline"] for one in document["candidates"]}
    for cell in document["cells"]:
        rows = {row["name"]: row for row in cell["rows"]}
        for name in (name for name in names if name in rows):
            for phase in (phase for phase in PHASES if "speedup" in rows[name].get(phase, {})):
                slim, dense = rows[name][phase], rows[baselines[name]][phase]
                over = slim["speedup"]
                yield _Timing(
                    name,
                    phase,
                    int(cell["batch"]),
                    int(cell["context"]),
                    _number(dense["median_ms"]),
                    _number(slim["median_ms"]),
                    _number(over["median"]),
                    _number(over["p20"]),
                    _number(over["p80"]),
                    _number(over["bound"]),
                    number(over["efficiency"]),
                )


def _number(value: Any) -> float:
    found = number(value)
    if found is None or found < 0:
        raise ValueError
    return found


def _part(document: Mapping[str, Any], names: Sequence[str], timings: list[_Timing]) -> Benchmark:
    baselines = {
        str(one["name"]): str(one["baseline"])
        for one in document["candidates"]
        if one["name"] in names
    }
    shown = {*baselines, *baselines.values()}
    memory = [one for one in document["memory"] if one["name"] in shown]
    charts: list[Chart] = []
    spreads: list[tuple[str, tuple[Spread, ...]]] = []
    for batch in sorted({timing.batch for timing in timings}):
        for phase in PHASES:
            these = [t for t in timings if (t.batch, t.phase) == (batch, phase)]
            if len({timing.context for timing in these}) > 1:
                charts.append(_speed_chart(phase, batch, these))
            elif these:
                spreads.append(_spreads(phase, batch, these))
        charts += _memory_chart(memory, baselines, batch)
    tables = [("Times", _times_table(timings)), ("Memory", _memory_table(memory))]
    return Benchmark(
        tuple(spreads),
        tuple(charts),
        tuple((title, table) for title, table in tables if table.rows),
        (_note(document),),
        tuple(text(problem) for problem in document["problems"]),
    )


def _speed_chart(phase: str, batch: int, timings: Sequence[_Timing]) -> Chart:
    series = []
    for hue, name in enumerate(dict.fromkeys(timing.name for timing in timings)):
        these = sorted((t for t in timings if t.name == name), key=lambda t: t.context)
        measured = tuple(Point(t.context, t.median, t.low, t.high) for t in these)
        limits = tuple(Point(t.context, t.bound) for t in these)
        series += [
            Series(name, measured, "main", hue),
            Series(f"{name}: bound", limits, "bound", hue),
        ]
    return Chart(
        f"{phase.capitalize()}, batch {batch}",
        "context, tokens",
        "speed-up over dense; bands are the 20th to 80th percentile",
        tuple(series),
        log_x=True,
        level=1.0,
        unit=TIMES,
        x_unit=" tokens",
        dashed="bound: the best possible",
    )


def _memory_chart(
    memory: Sequence[Mapping[str, Any]], baselines: Mapping[str, str], batch: int
) -> list[Chart]:
    """Weights and cache over context, where there are several contexts."""
    held = {str(record["name"]): _held(record, batch) for record in memory}
    series: list[Series] = []
    for hue, (name, dense) in enumerate(baselines.items()):
        if len(held.get(name, ())) > 1:
            series.append(Series(dense, held.get(dense, ()), "bound", hue))
            series.append(Series(name, held[name], "main", hue))
    if not series:
        return []
    chart = Chart(
        f"Memory, batch {batch}",
        "context, tokens",
        "weights and KV cache, MB",
        tuple(series),
        log_x=True,
        unit=" MB",
        x_unit=" tokens",
        dashed="the dense model in the same engine",
    )
    return [chart]


def _held(record: Mapping[str, Any], batch: int) -> tuple[Point, ...]:
    """Weights and cache of one candidate in MB, by context."""
    weights = _number(record["weight_bytes"])
    cells = (cell for cell in record["cells"] if cell["batch"] == batch)
    found = [
        (_number(cell["context"]), (weights + _number(cell["kv_bytes"])) / 1e6) for cell in cells
    ]
    return tuple(Point(context, megabytes) for context, megabytes in sorted(found))


def _spreads(phase: str, batch: int, timings: Sequence[_Timing]) -> tuple[str, tuple[Spread, ...]]:
    context = count(timings[0].context)
    rows = tuple(Spread(t.name, t.median, t.low, t.high, t.bound) for t in timings)
    return f"{phase.capitalize()}, batch {batch}, context {context}: speed-up over dense", rows


def _times_table(timings: Sequence[_Timing]) -> Table:
    rows = tuple(
        (
            t.name,
            t.phase,
            count(t.batch),
            count(t.context),
            f"{figure(t.dense_ms)} ms",
            f"{figure(t.slim_ms)} ms",
            times(t.median),
            times(t.bound),
            "no gain possible"
            if t.efficiency is None
            else percent(t.efficiency)
            if t.efficiency >= 0
            else "none",
        )
        for t in timings
    )
    return Table(_TIMES, rows, frozenset({0, 1}))


def _memory_table(memory: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for record in memory:
        before, weights = _number(record["before_bytes"]), _number(record["weight_bytes"])
        for cell in record["cells"]:
            rows.append(
                (
                    str(record["name"]),
                    count(_number(cell["batch"])),
                    count(_number(cell["context"])),
                    byte_size(weights),
                    byte_size(_number(cell["kv_bytes"])),
                    byte_size(max(_number(cell["peak_bytes"]) - before, 0.0)),
                )
            )
    return Table(_MEMORY, tuple(rows), frozenset({0}))


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

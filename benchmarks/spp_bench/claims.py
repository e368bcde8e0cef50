"""Published headline figures as rows beside ours: what was claimed, what is measured, the bound.

The claims are those of SubspacePath Pruner's project page and paper for its prompt-time masks.
They were measured with answers of different lengths, and with a mask that shrinks nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from spp_bench import plan_time
from spp_bench.measure import PHASES
from spp_export.models.shape import ModelShape

COMPILE_SECONDS = (0.027, 0.068)
SPEEDUPS = (1.24, 3.22)
MEMORY_GB = (13.0, 12.1)
_SEEDS = 9
# Each sample runs all of a scenario's prompts through the model.
_TEXTS = 2


def claim_rows(
    document: Mapping[str, Any], shape: ModelShape, keep: float = 0.7, *, demo: bool = False
) -> list[dict[str, Any]]:
    """A row per claim: its name, what our figure is measured on, and the least and most of the
    published, measured and bounding values over all cells. `keep` is the share of the heads'
    parameters that the timed plan keeps. `demo` also times the way from a scenario's text to a
    plan, which needs the default model."""
    return [
        _compile_row(shape, keep),
        *(_diagnosis_row(keep) if demo else ()),
        *_speedup_rows(document),
        *_memory_rows(document),
    ]


def _row(
    claim: str,
    published: Sequence[float],
    what: str,
    values: Sequence[float],
    bound: Sequence[float],
) -> dict[str, Any]:
    return {
        "claim": claim,
        "published": [min(published), max(published)],
        "what": what,
        "measured": [min(values), max(values)],
        "bound": [min(bound), max(bound)] if bound else None,
    }


def _compile_row(shape: ModelShape, keep: float) -> dict[str, Any]:
    times = plan_time.from_scores(shape, "heads", keep, _SEEDS)
    seconds = [round(times[f"{name}_ms"] / 1e3, 6) for name in ("p20", "p80")]
    what = f"scores to plan, {keep:g} of the heads' parameters kept"
    return _row("compile time, s", COMPILE_SECONDS, what, seconds, ())


def _diagnosis_row(keep: float) -> Iterator[dict[str, Any]]:
    if plan_time.SCENARIO.exists():
        timing = plan_time.from_text(keep, _TEXTS)
        what = (
            f"forwarding a scenario's {timing.prompts} prompts to plan, {keep:g} of the heads' "
            "parameters kept"
        )
        seconds = [round(value, 4) for value in timing.seconds]
        yield _row("compile time, s", COMPILE_SECONDS, what, seconds, ())


def _speedup_rows(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for candidate in document["candidates"]:
        for phase in PHASES:
            ratios = [
                row[phase]["speedup"]
                for cell in document["cells"]
                for row in cell["rows"]
                if row["name"] == candidate["name"] and "speedup" in row.get(phase, {})
            ]
            if ratios:
                yield _row(
                    "speed-up",
                    SPEEDUPS,
                    f"{candidate['name']}, {phase}",
                    [over["median"] for over in ratios],
                    [over["bound"] for over in ratios],
                )


def _memory_rows(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Ratios of dense to slim, since the published pair is for another model; the bound is
    predicted."""
    records = {record["name"]: record for record in document["memory"]}
    for candidate in document["candidates"]:
        if candidate["baseline"] in records and candidate["name"] in records:
            pair = records[candidate["baseline"]], records[candidate["name"]]
            expected = (record["predicted_weight_bytes"] for record in pair)
            yield _row(
                "memory, dense over slim",
                [round(MEMORY_GB[0] / MEMORY_GB[1], 4)],
                f"{candidate['name']}, weights and KV cache",
                _ratios(*pair, ""),
                () if None in expected else _ratios(*pair, "predicted_"),
            )


def _ratios(dense: Mapping[str, Any], slim: Mapping[str, Any], kind: str) -> list[float]:
    weights, kv = f"{kind}weight_bytes", f"{kind}kv_bytes"
    return [
        round((dense[weights] + before[kv]) / (slim[weights] + after[kv]), 4)
        for before, after in zip(dense["cells"], slim["cells"], strict=True)
    ]

"""The rows of a standard evaluation: every criterion asked for, and always the controls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from spp_export.evaluation.harness.rows import DENSE, Row
from spp_export.models.shape import Units
from spp_export.planning import Compensation

RANDOM_SEEDS = (0, 1, 2)
# They mask the dense model batch by batch; nothing of them can be compensated or exported.
DYNAMIC = ("probe-pruning", "full-batch-probing")
# Name -> what opens a row of it, from the session, the row and texts of a history. Whoever has
# such a baseline registers it, as benchmarks/spp_campaigns/probe_pruning.py does.
BASELINES: dict[str, Callable[[Any, Row, Sequence[str]], Any]] = {}


def standard_rows(
    keeps: Sequence[float],
    criteria: Sequence[str],
    units: Sequence[Units] = ("heads",),
    compensations: Sequence[Compensation] = ("lstsq",),
    *,
    comparable: str | None = None,
    wrong: bool = True,
    ablations: bool = False,
    other_artifacts: Sequence[str] = (),
) -> tuple[Row, ...]:
    """The dense row, then budget by budget the criteria and their controls, each row once.

    Controls: random with three seeds, the whitelist filled up at random, and the first criterion
    with all domains alike and (`wrong`) with another scenario. Ablations: the first criterion
    without the whitelist, with one domain, and with each of `other_artifacts`.
    """
    rows = [DENSE]
    for keep in keeps:
        for unit in units:
            rows += [
                Row(keep, unit, name, compensation="none", whitelist=False, kind="dynamic")
                for name in criteria
                if name in DYNAMIC
            ]
            for compensation in compensations:
                base = Row(keep, unit, "", comparable, compensation)
                static = [name for name in criteria if name not in DYNAMIC]
                rows += [_method(replace(base, criterion=name)) for name in static]
                rows += _controls(base, static[:1], wrong)
                if ablations:
                    rows += _ablations(base, static[:1], other_artifacts)
    return tuple(dict.fromkeys(rows))


def _method(row: Row) -> Row:
    """Random is a control by whatever way it comes in."""
    return _random(row, 0) if row.criterion == "random" else row


def _random(base: Row, seed: int) -> Row:
    return replace(
        base, criterion="random", comparable=None, seed=seed, whitelist=False, kind="control"
    )


def _controls(base: Row, first: Sequence[str], wrong: bool) -> Iterator[Row]:
    for seed in RANDOM_SEEDS:
        yield _random(base, seed)
    yield replace(_random(base, 0), whitelist=True)
    for name in first:
        control = replace(base, criterion=name, kind="control")
        yield replace(control, text="mean")
        if wrong:
            yield replace(control, text="wrong")


def _ablations(base: Row, first: Sequence[str], other_artifacts: Sequence[str]) -> Iterator[Row]:
    for name in first:
        ablation = replace(base, criterion=name, kind="ablation")
        yield replace(ablation, whitelist=False)
        yield replace(ablation, text="single")
        for other in other_artifacts:
            yield replace(ablation, artifacts=other)

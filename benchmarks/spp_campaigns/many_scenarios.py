"""Memory of many scenarios of one model in one process, and the time of switching between them.

`python -m spp_campaigns.many_scenarios --model demo --keep 0.5 SCENARIO...` makes a plan per
scenario. Then it measures in fresh processes how much memory the dense model, `load_many` of the
plans, and the exports loaded separately hold. One of these processes also measures the time to the
first token after a switch to another model, and without a switch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import spp_export
from spp_bench.processes import held, run_fresh
from spp_campaigns.command import finish, machine, parser, scratch, table

_LIMIT_S = 1800
_ROUNDS = 15
_PROMPT = 64
WAYS = ("dense", "together", "together, picked", "apart")
_COLUMNS = {
    "way": "{way}",
    "MB": "{mb:.0f}",
    "over dense": "{over_dense:.2f}",
    "load s": "{load_s:.2f}",
    "first token s": "{first_token_same_s:.4f}",
    "after a switch s": "{first_token_switched_s:.4f}",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 if the models together take `--limit` times the dense one's memory or
    more."""
    made = parser(__doc__, writes=True)
    made.add_argument("scenarios", nargs="+", help="scenario files")
    made.add_argument("--model", default="demo", help="directory or demo")
    made.add_argument("--artifacts", help="artifacts of the model; not needed for demo")
    made.add_argument("--keep", type=float, default=0.5, help="share of head parameters")
    made.add_argument("--limit", type=float, default=1.5, help="highest memory over dense")
    options = made.parse_args(arguments)
    ways = {}
    with scratch(options) as place:
        job = _job(options, place)
        for way in WAYS:
            ways[way] = run_fresh(measure, way, job, limit_s=_LIMIT_S)
            if "error" in ways[way]:
                raise SystemExit(f"{way}: {ways[way]['error']}")
    for row in ways.values():
        row["over_dense"] = round(row["bytes"] / ways["dense"]["bytes"], 4)
    document = {
        "machine": machine(),
        "model": options.model,
        "keep": options.keep,
        "units": "heads",
        "scenarios": [Path(path).stem for path in options.scenarios],
        "ways": ways,
    }
    title = (
        f"{len(options.scenarios)} scenarios of {options.model}, "
        f"{1 - options.keep:.0%} of head parameters removed"
    )
    rows = [{"way": way, "mb": row["bytes"] / 1e6, **row} for way, row in ways.items()]
    finish(options, document, title, table(_COLUMNS, rows))
    return int(ways["together, picked"]["over_dense"] >= options.limit)


def _job(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Plans and exports of every scenario; statistics they need are cached here, not in a child."""
    plans, exports = [], []
    for number, scenario in enumerate(options.scenarios):
        out = place / f"{number}"
        spp_export.export(
            scenario,
            out,
            model=options.model,
            artifacts=options.artifacts,
            keep=options.keep,
            verify=False,
        )
        exports.append(str(out))
        plans.append(str(out / "plan.json"))
    return {
        "model": options.model,
        "artifacts": options.artifacts,
        "scenarios": options.scenarios,
        "plans": plans,
        "exports": exports,
    }


def measure(way: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """Measure one way in this process."""
    import torch

    from spp_export.models.hub import locate_model

    dense = locate_model(job["model"]).path
    # Code belongs to no model: all of it is imported before.
    import spp_export.commands.load
    import spp_export.models.loader

    ids = torch.arange(1, _PROMPT + 1)[None]
    before = held()
    models: dict[str, Any]
    result: dict[str, Any] = {}
    if way == "dense":
        models = {"dense": spp_export.load_dense(dense)}
    elif way == "apart":
        models = {path: spp_export.load_slim(path) for path in job["exports"]}
    else:
        began = time.perf_counter()
        many = spp_export.load_many(
            job["model"],
            job["plans"],
            artifacts=job["artifacts"],
            scenarios={Path(path).stem: path for path in job["scenarios"]},
        )
        result["load_s"] = round(time.perf_counter() - began, 3)
        if way == "together, picked":
            result["picks"] = [many.pick(_first_turn(path)) for path in job["scenarios"]]
            result["pick_s"] = _median(lambda: many.pick(_first_turn(job["scenarios"][0])))
        models = dict(many)
        result["parameter_bytes"] = many.nbytes
    result["bytes"] = held() - before
    if len(models) > 1:
        result |= _switching(list(models.values()), ids)
    return result


def _first_turn(scenario: str) -> str:
    from spp_export.data.scenario import read_scenario

    # A prompt that an export holds out, so that no plan saw it.
    return read_scenario(scenario).split()[1][0].prompts[0]


def _switching(models: Sequence[Any], ids: Any) -> dict[str, Any]:
    """Seconds to the first token of a prompt from the model that ran last, and from another
    one."""
    for model in models:
        _token(model, ids)
    same, switched = [], []
    for number in range(_ROUNDS):
        first_token = partial(_token, models[number % len(models)], ids)
        switched.append(_seconds(first_token))
        same.append(_seconds(first_token))
    return {
        "first_token_same_s": round(statistics.median(same), 5),
        "first_token_switched_s": round(statistics.median(switched), 5),
    }


def _token(model: Any, ids: Any) -> None:
    import torch

    with torch.no_grad():
        model(input_ids=ids, use_cache=True, logits_to_keep=1)


def _seconds(job: Callable[[], object]) -> float:
    began = time.perf_counter()
    job()
    return time.perf_counter() - began


def _median(job: Callable[[], object]) -> float:
    return round(statistics.median(_seconds(job) for _ in range(5)), 4)


if __name__ == "__main__":
    sys.exit(main())

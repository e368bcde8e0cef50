"""Memory of many scenarios of one model in one process, and the time of switching between them.

`python -m spp_campaigns.many_scenarios --model demo --keep 0.5 SCENARIO...` makes a plan per
scenario, then measures in fresh processes what the dense model, `load_many` of the plans, and the
exports loaded separately hold; and in one of them what the first token takes from another model
than before, beside one from the same model again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import spp_export
from spp_bench.memory_child import held
from spp_campaigns.machine import machine
from spp_campaigns.steps import run_step
from spp_export.common.json_files import dump_json

_LIMIT_S = 1800
_ROUNDS = 15
_PROMPT = 64
WAYS = ("dense", "together", "together, picked", "apart")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 where the models together take `--limit` times the dense one or more."""
    if (arguments or sys.argv[1:])[:1] == ["--child"]:
        return _child(*(arguments or sys.argv[1:])[1:])
    options = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="spp-many-", dir=options.dir) as scratch:
        job = Path(scratch) / "job.json"
        job.write_text(json.dumps(_job(options, Path(scratch))), encoding="utf-8")
        found = {way: _step(way, job) for way in WAYS}
    dense = found["dense"]["bytes"]
    document = {
        "machine": machine(),
        "model": options.model,
        "keep": options.keep,
        "units": "heads",
        "scenarios": [Path(path).stem for path in options.scenarios],
        "ways": {
            way: {**row, "over_dense": round(row["bytes"] / dense, 4)} for way, row in found.items()
        },
    }
    if options.json:
        options.json.write_text(dump_json(document), encoding="utf-8")
    Console(width=110).print(_table(document))
    return int(document["ways"]["together, picked"]["over_dense"] >= options.limit)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spp_campaigns.many_scenarios", description=__doc__)
    parser.add_argument("scenarios", nargs="+", help="scenario files")
    parser.add_argument("--model", default="demo", help="directory or demo")
    parser.add_argument("--artifacts", help="of the model; the demo model's come with spp")
    parser.add_argument("--keep", type=float, default=0.5, help="share of head parameters")
    parser.add_argument("--limit", type=float, default=1.5, help="most memory over dense")
    parser.add_argument("--dir", type=Path, help="where exports are written and thrown away")
    parser.add_argument("--json", type=Path, help="file to write")
    return parser


def _job(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Plans and exports of every scenario; statistics they need are cached here, not in a child."""
    plans, exports = [], []
    for number, scenario in enumerate(options.scenarios):
        out = scratch / f"{number}"
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


def _step(way: str, job: Path) -> dict[str, Any]:
    found = run_step("many_scenarios", ["--child", way, str(job)], _LIMIT_S)
    if "error" in found:
        raise SystemExit(f"{way}: {found['error']}")
    return found


def _child(way: str, job_file: str, answer: str) -> int:
    """Measure one way in this process."""
    import torch

    from spp_export.models.hub import locate_model

    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    dense = locate_model(job["model"]).path
    # Code is no model's: all of it is imported before.
    import spp_export.commands.load
    import spp_export.models.loader

    ids = torch.arange(1, _PROMPT + 1)[None]
    before = held("cpu")
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
    result["bytes"] = held("cpu") - before
    if len(models) > 1:
        result |= _switching(list(models.values()), ids)
    Path(answer).write_text(json.dumps(result), encoding="utf-8")
    return 0


def _first_turn(scenario: str) -> str:
    from spp_export.data.scenario import read_scenario

    # One that export holds out, so that no plan saw it.
    return read_scenario(scenario).split()[1][0]


def _switching(models: Sequence[Any], ids: Any) -> dict[str, Any]:
    """Seconds to the first token of a prompt: from the model that ran last, and from another."""
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


def _table(document: dict[str, Any]) -> Table:
    title = (
        f"{len(document['scenarios'])} scenarios of {document['model']}, "
        f"{1 - document['keep']:.0%} of head parameters removed"
    )
    table = Table(title=title, box=None, padding=(0, 2, 0, 0), title_justify="left")
    for name in ("way", "MB", "over dense", "load s", "first token ms", "after a switch ms"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for way, row in document["ways"].items():
        table.add_row(
            way,
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['over_dense']:.2f}",
            _number(row, "load_s", 1, "{:.2f}"),
            _number(row, "first_token_same_s", 1e3, "{:.1f}"),
            _number(row, "first_token_switched_s", 1e3, "{:.1f}"),
        )
    return table


def _number(row: dict[str, Any], key: str, scale: float, form: str) -> str:
    return form.format(row[key] * scale) if key in row else ""


if __name__ == "__main__":
    sys.exit(main())

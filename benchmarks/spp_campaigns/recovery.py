"""What LoRA recovery is worth: `python -m spp_campaigns.recovery --model demo --keep 0.6`.

Exports a scenario with and without compensation, recovers both on a pool's training text, and
measures perplexity on its validation text, which nothing was chosen or trained on: dense, slim,
recovered. Trained on the same text, a dense model would gain, too; so it is trained alike, as a
plan that keeps everything, and what the text alone is worth stands beside what recovery is.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import spp_export
from spp_campaigns.machine import machine
from spp_export.common.json_files import dump_json
from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.models.hub import locate_model
from spp_export.planning import Plan, dense_plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; with --json also write it. 1 where recovery does not lower perplexity."""
    options = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="spp-recovery-", dir=options.dir) as scratch:
        rows = [_row(name, options, Path(scratch)) for name in ("lstsq", "none", "dense")]
    document = {
        "machine": machine(),
        "model": options.model,
        "scenario": Path(options.scenario).stem,
        "keep": options.keep,
        "units": "heads",
        "settings": {"steps": options.steps, "max_tokens": options.max_tokens},
        "rows": rows,
    }
    if options.json:
        options.json.write_text(dump_json(document), encoding="utf-8")
    Console(width=110).print(_table(document))
    return int(any(row["after"] >= row["before"] for row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spp_campaigns.recovery", description=__doc__)
    parser.add_argument("--model", default="demo", help="directory or demo")
    parser.add_argument("--artifacts", help="of the model; the demo model's come with spp")
    parser.add_argument("--scenario", required=True, help="scenario file")
    parser.add_argument("--data", required=True, help="text to train on")
    parser.add_argument("--validation", required=True, help="text to measure on")
    parser.add_argument("--keep", type=float, default=0.6, help="share of head parameters")
    parser.add_argument("--steps", type=int, default=60, help="of the optimiser")
    parser.add_argument("--max-tokens", type=int, default=128, help="of a text that are read")
    parser.add_argument("--dir", type=Path, help="where exports are written and thrown away")
    parser.add_argument("--json", type=Path, help="file to write")
    return parser


def _row(name: str, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """One model before and after; `name` is its compensation, or dense."""
    slim = scratch / name
    plan: Plan | None = None
    decided: dict[str, Any] = {}
    if name == "dense":
        place = locate_model(options.model)
        source = open_source(place.path, place.name)
        plan = dense_plan(source.shape, source.fingerprint, source.name)
    else:
        decided = {"keep": options.keep, "compensate": name}
    spp_export.export(
        None if plan else options.scenario,
        slim,
        model=options.model,
        artifacts=options.artifacts,
        plan=plan,
        verify=False,
        **decided,
    )
    began = time.perf_counter()
    found = spp_export.recover(
        slim,
        options.data,
        scratch / f"{name}-recovered",
        model=options.model,
        validation=options.validation,
        steps=options.steps,
        max_tokens=options.max_tokens,
    )
    assert found.before is not None
    assert found.after is not None
    return {
        "compensation": name,
        "dense": round(found.before.dense_perplexity, 4),
        "before": round(found.before.slim_perplexity, 4),
        "after": round(found.after.slim_perplexity, 4),
        "tokens": found.before.tokens,
        "verified": found.report["passed"],
        "seconds": round(time.perf_counter() - began, 1),
    }


def _table(document: dict[str, Any]) -> Table:
    title = (
        f"{document['model']}, {1 - document['keep']:.0%} of head parameters removed for "
        f"{document['scenario']}, {document['settings']['steps']} steps"
    )
    table = Table(title=title, box=None, padding=(0, 2, 0, 0), title_justify="left")
    for name in ("compensation", "dense", "slim", "recovered", "over dense", "s"):
        table.add_column(name, justify="left" if name == "compensation" else "right")
    for row in document["rows"]:
        table.add_row(
            "none: the dense model, trained alike"
            if row["compensation"] == "dense"
            else row["compensation"],
            f"{row['dense']:.2f}",
            f"{row['before']:.2f}",
            f"{row['after']:.2f}",
            f"{row['after'] / row['dense']:.3f}",
            f"{row['seconds']:.0f}",
        )
    return table


if __name__ == "__main__":
    raise SystemExit(main())

"""Command line of the package: see its docstring."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console

from spp_campaigns.big_checkpoints import build
from spp_campaigns.machine import machine
from spp_campaigns.peers.candidates import CANDIDATES, TORCH_PRUNING
from spp_campaigns.peers.measure import EQUAL_WITHIN, Options, measure
from spp_campaigns.peers.plans import PLANS
from spp_campaigns.peers.report import report
from spp_export.common.json_files import dump_json
from spp_export.models.hub import locate_model


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; with --json also write everything to a file. 1 where spp's own rows are
    not equal to the masked model."""
    options = _parser().parse_args(arguments)
    chosen = [CANDIDATES[name] for name in options.only or CANDIDATES]
    asked = Options(chosen, options.plan, options.precision, options.limit)
    models = []
    for name in options.model or (() if options.gigabytes else ("demo",)):
        with _scratch(options.dir) as scratch:
            found = locate_model(name)
            models.append(measure(found.path, found.name, asked, scratch))
    for size in options.gigabytes or ():
        with _scratch(options.dir) as scratch:
            model = scratch / "model"
            model.mkdir()
            build(model, size)
            models.append(measure(model, f"random, {size:g} GB", asked, scratch))
    document = {"machine": {**machine(), **_torch_pruning()}, "models": models}
    if options.json:
        options.json.write_text(dump_json(document), encoding="utf-8")
    Console(width=160).print(report(document))
    return int(not _ours_are_right(models))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="spp_campaigns.peers", description=__doc__)
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--model", action="append", help="directory or demo, repeatable")
    parser.add_argument(
        "--gigabytes", type=float, action="append", help="a random bf16 model; repeatable"
    )
    parser.add_argument("--only", action="append", choices=list(CANDIDATES), help="repeatable")
    parser.add_argument("--plan", action="append", choices=PLANS, help="repeatable")
    parser.add_argument(
        "--precision", choices=list(EQUAL_WITHIN), default="float32", help="of the compared logits"
    )
    parser.add_argument("--dir", type=Path, help="where to write; needs three times a model's size")
    parser.add_argument("--limit", type=float, default=300, help="seconds that a step may take")
    return parser


@contextmanager
def _scratch(place: Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=place, prefix="spp-peers-") as scratch:
        yield Path(scratch)


def _torch_pruning() -> dict[str, str]:
    with suppress(PackageNotFoundError):
        return {TORCH_PRUNING: version(TORCH_PRUNING)}
    return {}


def _ours_are_right(models: Sequence[dict[str, Any]]) -> bool:
    rows = [row for model in models for case in model["cases"] for row in case["rows"]]
    ours = [row for row in rows if row["name"] == "spp"]
    return all(row.get("as_asked") and row.get("equal", True) for row in ours)


if __name__ == "__main__":
    raise SystemExit(main())

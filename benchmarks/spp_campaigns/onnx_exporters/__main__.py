"""Command line of the package: see its docstring."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console

from spp_campaigns.machine import machine
from spp_campaigns.onnx_exporters.candidates import CANDIDATES, Candidate
from spp_campaigns.onnx_exporters.compare import Workload, compare
from spp_campaigns.onnx_exporters.exports import run_export
from spp_campaigns.onnx_exporters.report import report
from spp_export.common.json_files import dump_json

LIBRARIES = ("onnx", "onnx-ir", "onnxruntime", "onnxruntime-genai", "onnxscript")


def measure(
    slim: Path, chosen: Sequence[Candidate], work: Workload, scratch: Path, limit_s: float
) -> dict[str, Any]:
    """Machine, workload and a row for everyone, in the order of `chosen`."""
    vocab = json.loads((slim / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    exports = {}
    for candidate in chosen:
        print(f"exporting: {candidate.name}", file=sys.stderr)
        exports[candidate.name] = run_export(candidate, slim, _place(scratch, candidate), limit_s)
    graphs = {
        candidate.name: [_place(scratch, candidate) / name for name in candidate.graphs]
        for candidate in chosen
        if "error" not in exports[candidate.name]
    }
    runs = compare(slim, vocab, graphs, work)
    return {
        "machine": {**machine(), **_versions()},
        "workload": dataclasses.asdict(work),
        "rows": _rows(exports, runs),
    }


def _place(scratch: Path, candidate: Candidate) -> Path:
    return scratch / candidate.name.replace(" ", "-")


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _rows(
    exports: Mapping[str, Mapping[str, Any]], runs: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    rows = []
    for name in dict.fromkeys([*runs, *exports]):
        known = CANDIDATES.get(name)
        what = {"what": known.what} if known else {}
        rows.append({"name": name, **what, **exports.get(name, {}), **runs.get(name, {})})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; with --json also write everything to a file."""
    parser = argparse.ArgumentParser(prog="spp_campaigns.onnx_exporters", description=__doc__)
    parser.add_argument("slim", type=Path, help="slim checkpoint, per-layer or uniform")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--only", action="append", choices=list(CANDIDATES), help="repeatable")
    parser.add_argument("--limit", type=float, default=600, help="seconds an export may take")
    parser.add_argument("--keep", type=Path, help="new directory for the exported graphs")
    for field in dataclasses.fields(Workload):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    options = parser.parse_args(arguments)
    chosen = [CANDIDATES[name] for name in options.only or CANDIDATES]
    work = Workload(options.prompt, options.new, options.rounds, options.threads)
    scratch = options.keep or Path(tempfile.mkdtemp(prefix="spp-exporters-"))
    try:
        document = measure(options.slim, chosen, work, scratch, options.limit)
    finally:
        if not options.keep:
            shutil.rmtree(scratch)
    if options.json:
        options.json.write_text(dump_json(document), encoding="utf-8")
    Console(width=170).print(report(document))


if __name__ == "__main__":
    main()

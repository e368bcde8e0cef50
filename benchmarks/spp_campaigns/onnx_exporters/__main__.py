"""Command line of the package: see its docstring."""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from spp_campaigns.command import finish, machine, parser, table, words
from spp_campaigns.onnx_exporters import __doc__ as description
from spp_campaigns.onnx_exporters.candidates import CANDIDATES, Candidate, run_export
from spp_campaigns.onnx_exporters.compare import Workload, compare

_COLUMNS = {
    "": "{name}",
    "export s": "{seconds:.1f}",
    "peak MB": "{peak_mb:.0f}",
    "file MB": "{file_mb:.0f}",
    "nodes": "{nodes}",
    "ms ops": "{microsoft_ops}",
    "batch": "{batch}",
    "diff prompt": "{prefill_diff:.1e}",
    "diff decode": "{decode_diff:.1e}",
    "prompt ms": "{prefill_median_ms:.0f} ({prefill_p20_ms:.0f}-{prefill_p80_ms:.0f})",
    "ms/token": "{decode_median_ms:.1f} ({decode_p20_ms:.1f}-{decode_p80_ms:.1f})",
}


def measure(
    slim: Path, chosen: Sequence[Candidate], work: Workload, directory: Path, limit_s: float
) -> dict[str, Any]:
    """Machine, workload and a row for every exporter, in the order of `chosen`."""
    vocab = json.loads((slim / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    exports = {}
    for candidate in chosen:
        print(f"exporting: {candidate.name}", file=sys.stderr)
        exports[candidate.name] = run_export(candidate, slim, _place(directory, candidate), limit_s)
    graphs = {
        candidate.name: [_place(directory, candidate) / name for name in candidate.graphs]
        for candidate in chosen
        if "error" not in exports[candidate.name]
    }
    runs = compare(slim, vocab, graphs, work)
    return {
        "machine": machine("onnxscript"),
        "workload": dataclasses.asdict(work),
        "rows": _rows(exports, runs),
    }


def _place(directory: Path, candidate: Candidate) -> Path:
    return directory / candidate.name.replace(" ", "-")


def _rows(
    exports: Mapping[str, Mapping[str, Any]], runs: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    rows = []
    for name in dict.fromkeys([*runs, *exports]):
        known = CANDIDATES.get(name)
        what = {"what": known.what} if known else {}
        rows.append({"name": name, **what, **exports.get(name, {}), **runs.get(name, {})})
    return rows


def report(document: Mapping[str, Any]) -> Iterator[str]:
    """The machine, the table, and below it a line for everything that failed."""
    yield words(document["machine"])
    yield words(document["workload"])
    yield table(_COLUMNS, document["rows"])
    for row in document["rows"]:
        if "error" in row:
            yield f"{row['name']}: {row['error']}"
        elif row.get("shared_kv", "yes") != "yes":
            yield f"{row['name']}: shared KV: {row['shared_kv']}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    made = parser(description)
    made.add_argument("slim", type=Path, help="slim checkpoint, per-layer or uniform")
    made.add_argument("--only", action="append", choices=list(CANDIDATES), help="repeatable")
    made.add_argument("--limit", type=float, default=600, help="seconds an export may take")
    made.add_argument("--keep", type=Path, help="new directory for the exported graphs")
    for field in dataclasses.fields(Workload):
        made.add_argument(f"--{field.name}", type=int, default=field.default)
    options = made.parse_args(arguments)
    chosen = [CANDIDATES[name] for name in options.only or CANDIDATES]
    work = Workload(options.prompt, options.new, options.rounds, options.threads)
    kept = nullcontext(options.keep) if options.keep else None
    with kept or tempfile.TemporaryDirectory(prefix="spp-exporters-") as directory:
        document = measure(options.slim, chosen, work, Path(directory), options.limit)
    finish(options, document, *report(document))


if __name__ == "__main__":
    main()

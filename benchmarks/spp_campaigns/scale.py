"""Slicing at any size: `python -m spp_campaigns.scale --gigabytes 1 4 15 --dir TMP [--json FILE]`.

Builds a random bf16 checkpoint of the Llama kind per size, sharded and untied, and exports a plan
that keeps about 0.8 of the head parameters, each time in a fresh process: open, slice, write, hash,
flush, publish. Before and after stands `cp` of the same files to the same disk, and a flush. The
model is out of the page cache at the start of each; with --warm it is in it, and only memory is
judged, as SHA-256 of a file then takes longer than its copy. The smallest model is exported as ONNX
as well; with --verify every one also by `spp export --plan`, with all its checks.

Needs twice the largest size in free space. Exits with 1 where slicing takes more than 1.5 times
`cp` and flush (the best of each), or more memory than 300 MB and twice the largest tensor.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spp_campaigns.big_checkpoints import build, copy, prepare
from spp_campaigns.machine import machine
from spp_export.common.json_files import dump_json
from spp_export.common.publish import require_free_space

FIXED_BYTES = 300_000_000
TIMES_CP = 1.5
# Of the wider copy that checks compute in.
_EXACT_BYTES = 8


def measure(job: str, model: Path, target: Path, repeats: int, cold: bool) -> dict[str, Any]:
    """A job and `cp` in turn; the best time of each and the largest peak."""
    copies, runs = [], []
    for _ in range(repeats):
        prepare(model, cold)
        copies.append(copy(model, target)[1])
        shutil.rmtree(target)
        prepare(model, cold)
        runs.append(_in_fresh_process(job, model, target))
        shutil.rmtree(target)
    found = dict(runs[0])
    found |= {
        name: max(run[name] for run in runs) for name in ("peak_bytes", "peak_anonymous_bytes")
    }
    found |= {
        "job": job,
        "cold_cache": cold,
        "seconds": min(run["seconds"] for run in runs),
        "all_seconds": [run["seconds"] for run in runs],
        "cp_and_flush_seconds": min(copies),
        "all_cp_and_flush_seconds": copies,
    }
    found["times_cp"] = found["seconds"] / found["cp_and_flush_seconds"]
    found["limit_bytes"] = limit(job, found)
    found["problems"] = problems(found)
    return found


def limit(job: str, found: Mapping[str, Any]) -> int:
    """Bytes of memory that a job may take; what libraries take by being imported is not its own."""
    own: int = 2 * found["largest_tensor_bytes"]
    if job == "verify":
        own = _EXACT_BYTES * found["resident_parameters"]
    imports: int = 0 if job == "slice" else found["imports_bytes"]
    return FIXED_BYTES + imports + own


def problems(found: Mapping[str, Any]) -> list[str]:
    """Which figures are missed. Time is judged of slicing alone, from the disk."""
    missed = []
    if found["peak_bytes"] > found["limit_bytes"]:
        missed.append("memory")
    if found["job"] == "slice" and found["cold_cache"] and found["times_cp"] > TIMES_CP:
        missed.append("time")
    return missed


def _in_fresh_process(job: str, model: Path, target: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "spp_campaigns.scale_child", job, str(model), str(target)]
    result = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a row per size and job; 1 where a figure is missed."""
    parser = argparse.ArgumentParser(prog="spp_campaigns.scale", description=__doc__)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.0, 4.0, 15.0])
    parser.add_argument("--dir", type=Path, help="where to write")
    parser.add_argument("--repeats", type=int, default=2, help="times each is measured")
    parser.add_argument("--warm", action="store_true", help="with the model in the page cache")
    parser.add_argument("--no-onnx", action="store_true", help="leave out the graph")
    parser.add_argument("--verify", action="store_true", help="also the whole export, checked")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args(arguments)
    rows = []
    for size in sorted(options.gigabytes):
        with tempfile.TemporaryDirectory(dir=options.dir, prefix="spp-scale-") as scratch:
            jobs = ["slice"]
            jobs += ["onnx"] * (size == min(options.gigabytes) and not options.no_onnx)
            jobs += ["verify"] * options.verify
            rows += _size(size, jobs, Path(scratch), options.repeats, not options.warm)
    if options.json:
        options.json.write_text(dump_json({"machine": machine(), "rows": rows}), encoding="utf-8")
    return int(any(row["problems"] for row in rows))


def _size(
    gigabytes: float, jobs: Sequence[str], scratch: Path, repeats: int, cold: bool
) -> list[dict[str, Any]]:
    require_free_space(scratch, round(2e9 * gigabytes))
    model = scratch / "model"
    model.mkdir()
    build(model, gigabytes)
    rows = []
    for job in jobs:
        rows.append(measure(job, model, scratch / "out", repeats, cold))
        print(_line(rows[-1]), flush=True)
    return rows


def _line(row: Mapping[str, Any]) -> str:
    verdict = f"MISSED: {', '.join(row['problems'])}" if row["problems"] else "within the figures"
    return (
        f"{row['job']:6} {row['source_bytes'] / 1e9:5.1f} GB to {row['out_bytes'] / 1e9:.1f} GB: "
        f"{row['seconds']:.2f} s, cp and flush {row['cp_and_flush_seconds']:.2f} s, "
        f"{row['times_cp']:.2f} times; peak {row['peak_bytes'] / 1e6:.0f} MB "
        f"({row['peak_anonymous_bytes'] / 1e6:.0f} anonymous) of {row['limit_bytes'] / 1e6:.0f}: "
        f"{verdict}"
    )


if __name__ == "__main__":
    sys.exit(main())

"""Slicing at any size: `python -m spp_campaigns.scale --gigabytes 1 4 15 --dir TMP [--json FILE]`.

For every size, builds a random bf16 checkpoint of the Llama family, sharded and untied, and
exports a plan that keeps about 0.8 of the head parameters, each time in a fresh process: open,
slice, write, hash, flush, publish. Exports take turns with `cp` of the same files to the same disk,
and a flush. The model is out of the page cache at the start of each run; with --warm it is in it,
and only memory is judged, since SHA-256 of a file then takes longer than its copy. The smallest
model is also exported as ONNX; with --verify every model is also exported by `spp export --plan`,
with all its checks.

Needs twice the largest size in free space. Exits with 1 if slicing takes more than 1.5 times as
long as `cp` and flush (the best of each), or more memory than 300 MB plus twice the largest
tensor.
"""

from __future__ import annotations

import importlib
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spp_bench.processes import peak, run_fresh, status_bytes
from spp_campaigns.big_checkpoints import build, copy, plan_for, prepare, watching_memory
from spp_campaigns.command import finish, machine, parser, scratch
from spp_export.common.json_files import dump_json
from spp_export.common.manifest import write_manifest
from spp_export.common.publish import publish, require_free_space
from spp_export.models.checkpoint.checkpoint import Checkpoint, open_source
from spp_export.slicing.config import slim_config
from spp_export.slicing.weights import write_slim_weights

FIXED_BYTES = 300_000_000
TIMES_CP = 1.5
# Of the wider copy that checks compute in.
_EXACT_BYTES = 8


def slice_only(source: Checkpoint, target: Path) -> None:
    """Slice, write, hash, flush and publish."""
    with publish(target) as work:
        written = write_slim_weights(source, plan_for(source), work)
        write_manifest(work, written.records)


def as_onnx(source: Checkpoint, target: Path) -> None:
    """The same, then a graph in the stored precision instead of the slim checkpoint."""
    from spp_export.formats.onnx import OnnxOptions
    from spp_export.formats.onnx.write import write_onnx

    plan = plan_for(source)
    with publish(target) as work:
        slim = work / "slim"
        slim.mkdir()
        write_slim_weights(source, plan, slim, kept=False)
        layers = plan.layer_shapes(source.shape)
        config = slim_config(source.config, source.family, source.shape, layers, plan.layout)
        (slim / "config.json").write_text(dump_json(config), encoding="utf-8")
        write_onnx(slim, work, OnnxOptions(precision="bf16"))
        shutil.rmtree(slim)
        write_manifest(work)


def verified(source: Checkpoint, target: Path) -> None:
    """All of `spp export --plan`, with every check."""
    import spp_export

    spp_export.export(output=target, model=str(source.path), plan=plan_for(source))


# Job -> what it does, and the modules whose import is not part of it.
JOBS: Mapping[str, tuple[Callable[[Checkpoint, Path], None], tuple[str, ...]]] = {
    "slice": (slice_only, ()),
    "onnx": (
        as_onnx,
        ("spp_export.models.modeling", "spp_export.formats.onnx.write", "onnx", "onnx_ir"),
    ),
    "verify": (verified, ("spp_export.models.modeling", "spp_export.models.layerwise")),
}


def run(job: str, model: Path, target: Path) -> dict[str, Any]:
    """Do a job in this process and return what it took; imports are not timed."""
    work, modules = JOBS[job]
    for module in modules:
        importlib.import_module(module)
    before = status_bytes("VmRSS")
    with watching_memory() as anonymous:
        start = time.perf_counter()
        source = open_source(model)
        work(source, target)
        seconds = time.perf_counter() - start
    shape = source.shape
    layer = shape.parameters((shape.layer,)) - shape.parameters(())
    layers = plan_for(source).layer_shapes(shape)
    return {
        "seconds": seconds,
        "peak_bytes": peak(),
        "peak_anonymous_bytes": anonymous["peak"],
        "imports_bytes": before,
        "source_bytes": sum(tensor.nbytes for tensor in source.tensors.values()),
        "out_bytes": sum(path.stat().st_size for path in target.iterdir()),
        "largest_tensor_bytes": max(tensor.nbytes for tensor in source.tensors.values()),
        "resident_parameters": 2 * layer + 2 * shape.vocab_size * shape.hidden_size,
        "head_parameters_kept": shape.head_parameters(layers) / shape.head_parameters(shape.layers),
    }


def measure(job: str, model: Path, target: Path, repeats: int, cold: bool) -> dict[str, Any]:
    """A job and `cp` in turn; the best time of each and the largest peak."""
    copies, runs = [], []
    for _ in range(repeats):
        prepare(model, cold)
        copies.append(copy(model, target)[1])
        shutil.rmtree(target)
        prepare(model, cold)
        runs.append(_fresh(job, model, target))
        shutil.rmtree(target)
    row = {
        **runs[0],
        **{name: max(run[name] for run in runs) for name in ("peak_bytes", "peak_anonymous_bytes")},
        "job": job,
        "cold_cache": cold,
        "seconds": min(run["seconds"] for run in runs),
        "all_seconds": [run["seconds"] for run in runs],
        "cp_and_flush_seconds": min(copies),
        "all_cp_and_flush_seconds": copies,
    }
    row["times_cp"] = row["seconds"] / row["cp_and_flush_seconds"]
    row["limit_bytes"] = limit(job, row)
    row["problems"] = problems(row)
    return row


def limit(job: str, row: Mapping[str, Any]) -> int:
    """Bytes of memory that a job may take, not counting what importing libraries takes."""
    own: int = 2 * row["largest_tensor_bytes"]
    if job == "verify":
        own = _EXACT_BYTES * row["resident_parameters"]
    imports: int = 0 if job == "slice" else row["imports_bytes"]
    return FIXED_BYTES + imports + own


def problems(row: Mapping[str, Any]) -> list[str]:
    """Which limits are exceeded. Time is judged for slicing alone, from the disk."""
    missed = []
    if row["peak_bytes"] > row["limit_bytes"]:
        missed.append("memory")
    if row["job"] == "slice" and row["cold_cache"] and row["times_cp"] > TIMES_CP:
        missed.append("time")
    return missed


def _fresh(job: str, model: Path, target: Path) -> dict[str, Any]:
    result = run_fresh(run, job, model, target)
    if "error" in result:
        raise SystemExit(f"{job} of {model}: {result['error']}")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a row per size and job; 1 if a limit is exceeded."""
    made = parser(__doc__, writes=True)
    made.add_argument("--gigabytes", type=float, nargs="+", default=[1.0, 4.0, 15.0])
    made.add_argument("--repeats", type=int, default=2, help="how often each is measured")
    made.add_argument("--warm", action="store_true", help="with the model in the page cache")
    made.add_argument("--no-onnx", action="store_true", help="leave out the ONNX export")
    made.add_argument("--verify", action="store_true", help="also spp export with all checks")
    options = made.parse_args(arguments)
    rows = []
    for size in sorted(options.gigabytes):
        with scratch(options) as place:
            jobs = ["slice"]
            jobs += ["onnx"] * (size == min(options.gigabytes) and not options.no_onnx)
            jobs += ["verify"] * options.verify
            rows += _size(size, jobs, place, options.repeats, not options.warm)
    finish(options, {"machine": machine(), "rows": rows})
    return int(any(row["problems"] for row in rows))


def _size(
    gigabytes: float, jobs: Sequence[str], place: Path, repeats: int, cold: bool
) -> list[dict[str, Any]]:
    require_free_space(place, round(2e9 * gigabytes))
    model = place / "model"
    model.mkdir()
    build(model, gigabytes)
    rows = []
    for job in jobs:
        rows.append(measure(job, model, place / "out", repeats, cold))
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

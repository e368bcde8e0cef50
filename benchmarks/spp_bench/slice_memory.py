"""Memory and time of slicing: `python -m spp_bench.slice_memory --gigabytes 2 --dir TMP [--json]`.

Builds a random bf16 checkpoint of the Llama kind, sharded and untied, and exports a plan that keeps
about 0.8 of the head parameters, each time in a fresh process: open, slice, write, hash, flush,
publish. `cp` of the same files to the same disk, and a flush, stands beside it. Exits with 1 if the
peak exceeds 300 MB plus twice the largest tensor.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spp_bench.machine import machine
from spp_export.checkpoint.atomic import publish
from spp_export.checkpoint.dtypes import Bits
from spp_export.checkpoint.manifest import write_manifest
from spp_export.checkpoint.slim import write_slim_weights
from spp_export.checkpoint.source import Source, open_source
from spp_export.checkpoint.writer import Entry, ShardWriter, plan_shards
from spp_export.families import family_of
from spp_export.jsonio import dump_json
from spp_export.plans import LayerPlan, Plan

FIXED_BYTES = 300_000_000
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 5632,
    "vocab_size": 32000,
    "dtype": "bfloat16",
}
# (KV groups, query heads of each) that layers keep in turn: 0.80, 0.875 and 0.75 of the heads.
KEPT = ((8, 3), (7, 4), (6, 4))


def build(directory: Path, gigabytes: float) -> None:
    """Write a random model of about this size, a block at a time."""
    family = family_of(CONFIG)
    one = family.read_shape({**CONFIG, "num_hidden_layers": 1}, 2)
    outside = 2 * one.parameters(())
    layer = 2 * one.parameters(one.layers) - outside
    config = {**CONFIG, "num_hidden_layers": max(1, round((gigabytes * 1e9 - outside) / layer))}
    shape = family.read_shape(config, 2)
    entries = [Entry(spec.name, "BF16", spec.shape) for spec in family.tensors(shape, shape.layers)]
    with ShardWriter(directory, plan_shards(entries, 1_000_000_000)) as writer:
        random = np.random.default_rng(0)
        for entry in writer.order:
            writer.write(entry.name, _random_blocks(entry, random))
    (directory / "config.json").write_text(dump_json(config), encoding="utf-8")


def _random_blocks(entry: Entry, random: np.random.Generator) -> Iterator[Bits]:
    left = entry.nbytes // 2
    while left:
        count = min(left, 1 << 21)
        # Without the top bit of the exponent every pattern is a number below 2.
        yield random.integers(0, 1 << 16, count, dtype=np.uint16) & np.uint16(0xBFFF)
        left -= count


def plan_for(source: Source, channels: float) -> Plan:
    """A per-layer plan over regular layers; `channels` is the share of MLP channels kept."""
    shape, random = source.shape, np.random.default_rng(1)
    layers = []
    for index in range(shape.num_layers):
        groups, heads = KEPT[index % len(KEPT)]
        first = index % (shape.kv_heads - groups + 1)
        kept = tuple(range(first, first + groups))
        size = shape.group_size
        query = tuple(group * size + head for group in kept for head in range(size - heads, size))
        chosen = random.permutation(shape.channels)[: round(shape.channels * channels)]
        width = None if channels == 1 else tuple(sorted(chosen.tolist()))
        layers.append(LayerPlan(kept, query, width))
    return Plan(source.fingerprint, source.name, "per-layer", "none", tuple(layers))


def export(model: Path, target: Path, channels: float) -> dict[str, Any]:
    """Export once, in this process, and tell seconds, peak memory and sizes."""
    start = time.perf_counter()
    source = open_source(model)
    plan = plan_for(source, channels)
    with publish(target) as work:
        written = write_slim_weights(source, plan, work)
        write_manifest(work, written.records)
    seconds = time.perf_counter() - start
    shape = source.shape
    heads = shape.head_parameters(plan.layer_shapes(shape)) / shape.head_parameters(shape.layers)
    return {
        "seconds": seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "source_bytes": sum(tensor.nbytes for tensor in source.tensors.values()),
        "slim_bytes": written.nbytes,
        "largest_tensor_bytes": max(tensor.nbytes for tensor in source.tensors.values()),
        "head_parameters_kept": heads,
    }


def _export_in_fresh_process(model: Path, target: Path, channels: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "spp_bench.slice_memory", "--export", str(model), str(target)]
    command += ["--channels", str(channels)]
    result = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def copy(model: Path, target: Path) -> tuple[float, float]:
    """Seconds of `cp`, and of `cp` and a flush of what it wrote."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(model), str(target)], check=True)
    copied = time.perf_counter()
    subprocess.run(["sync", *map(str, target.iterdir())], check=True)
    return copied - start, time.perf_counter() - start


def prepare(model: Path, cold: bool) -> None:
    """Let earlier writes reach the disk; take the model out of the page cache, or into it."""
    os.sync()
    for path in model.iterdir():
        with path.open("rb") as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(1 << 24):
                    pass


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Copies and exports in turn; medians over the repeats, and the largest peak."""
    model, target = scratch / "model", scratch / "out"
    model.mkdir()
    build(model, options.gigabytes)
    exports, copies = [], []
    for _ in range(options.repeats):
        prepare(model, options.cold)
        copies.append(copy(model, target))
        shutil.rmtree(target)
        prepare(model, options.cold)
        exports.append(_export_in_fresh_process(model, target, options.channels))
        shutil.rmtree(target)
    seconds = statistics.median(result["seconds"] for result in exports)
    flushed = statistics.median(copy[1] for copy in copies)
    bound = FIXED_BYTES + 2 * exports[0]["largest_tensor_bytes"]
    peak = max(result["peak_bytes"] for result in exports)
    return {
        **exports[0],
        "seconds": seconds,
        "peak_bytes": peak,
        "bound_bytes": bound,
        "within_bound": peak <= bound,
        "cp_seconds": statistics.median(copy[0] for copy in copies),
        "cp_and_flush_seconds": flushed,
        "times_cp_and_flush": seconds / flushed,
        "cold_cache": options.cold,
        "repeats": options.repeats,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table, or with --json one JSON object; 1 if the memory bound does not hold."""
    parser = argparse.ArgumentParser(prog="spp_bench.slice_memory", description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the dense model")
    parser.add_argument("--channels", type=float, default=1.0, help="share of MLP channels kept")
    parser.add_argument("--dir", type=Path, help="where to write; needs three times that size")
    parser.add_argument("--repeats", type=int, default=3, help="times each is measured")
    parser.add_argument("--cold", action="store_true", help="drop the model from the page cache")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--export", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.export:
        model, target = options.export
        print(json.dumps(export(model, target, options.channels)))
        return 0
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="spp-slice-") as scratch:
        result = measure(options, Path(scratch))
    if options.json:
        print(json.dumps({"machine": machine(), "result": result}))
    else:
        _print(result)
    return 0 if result["within_bound"] else 1


def _print(result: dict[str, Any]) -> None:
    print(" ".join(f"{name}: {value}" for name, value in machine().items()))
    for name, value in result.items():
        if name.endswith("_bytes"):
            print(f"{name.removesuffix('_bytes').replace('_', ' '):24} {value / 1e6:10.1f} MB")
        elif isinstance(value, float):
            print(f"{name.replace('_', ' '):24} {value:10.3f}")
        else:
            print(f"{name.replace('_', ' '):24} {value!s:>10}")


if __name__ == "__main__":
    sys.exit(main())

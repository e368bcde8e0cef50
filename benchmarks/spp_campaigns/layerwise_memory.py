"""Memory of verifying layer by layer: `python -m spp_campaigns.layerwise_memory --dir TMP`.

Builds a random bf16 checkpoint, `--gigabytes` of the Llama family or `--qwen2-14b`, exports a plan
for it in a fresh process and checks it there against the masked dense model, layer by layer, in
float32 and with a float64 oracle. Of the 14B model only embedding, head, norms and the first two
layers have values; the rest are zeros that take no disk space, but are read and computed with like
any others. Exits with 1 if a check fails, or if the peak exceeds two layers and the embeddings in
float64, 300 MB and what Python has imported.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spp_bench.processes import run_fresh, status_bytes
from spp_bench.shapes.shapes import published
from spp_campaigns.big_checkpoints import SHARD_BYTES, build, plan_for, watching_memory
from spp_campaigns.command import finish, machine, parser, scratch
from spp_export.common.json_files import dump_json
from spp_export.models.checkpoint.checkpoint import Checkpoint
from spp_export.models.checkpoint.writer import TensorEntry, header_of, plan_shards, shard_index
from spp_export.models.families import Role, TensorSpec, family_of
from spp_export.models.shape import resident_parameters
from spp_export.planning import LayerPlan, Plan

FIXED_BYTES = 300_000_000
ROWS = 4
_BF16_UNIT = 0x3F80


def build_sparse(directory: Path, config: dict[str, Any]) -> None:
    """A checkpoint of holes, except for two layers, the norms, and everything outside the
    layers."""
    family = family_of(config)
    shape = family.read_shape(config, 2)
    specs = {spec.name: spec for spec in family.tensors(shape, shape.layers)}
    shards = plan_shards(
        [TensorEntry(s.name, "BF16", s.shape) for s in specs.values()], SHARD_BYTES
    )
    random = np.random.default_rng(0)
    for shard in shards:
        header = header_of(shard)
        with (directory / shard.file).open("wb") as file:
            file.write(header)
            begin = len(header)
            for entry in shard.entries:
                file.seek(begin)
                _fill(file.write, specs[entry.name], random)
                begin += entry.nbytes
            file.truncate(begin)
    index = directory / "model.safetensors.index.json"
    index.write_text(shard_index(shards), encoding="utf-8")
    (directory / "config.json").write_text(dump_json(config), encoding="utf-8")


def _fill(write: Callable[[Any], Any], spec: TensorSpec, random: np.random.Generator) -> None:
    """Ones for norms, noise that keeps activations near one for matrices; nothing for a hole."""
    if len(spec.shape) == 1 and spec.role is Role.OTHER:
        write(np.full(spec.shape, _BF16_UNIT, np.uint16))
    elif spec.layer is None or spec.layer < 2:
        scale = 1 / np.sqrt(spec.shape[-1]) if len(spec.shape) == 2 else 0.1
        for _ in range(spec.shape[0]):
            row = random.standard_normal(spec.shape[1:] or 1, np.float32) * np.float32(scale)
            write((row.view(np.uint32) >> 16).astype(np.uint16))


def narrow_plan(source: Checkpoint) -> Plan:
    """Two KV groups and a sixteenth of the channels of every layer: a slim model that is small
    beside the dense one, every byte of which is still read."""
    shape = source.shape
    groups = (0, shape.kv_heads - 1)
    heads = [g * shape.group_size + i for g in groups for i in range(shape.group_size)]
    layer = LayerPlan(groups, tuple(heads), tuple(range(0, shape.channels, 16)))
    layers = (layer,) * shape.num_layers
    return Plan(source.fingerprint, source.name, "per-layer", "none", layers)


def run(model: Path, out: Path, tokens: int, narrow: bool) -> dict[str, Any]:
    """Export and check in this process, and return seconds and peaks."""
    import torch

    import spp_export
    import spp_export.models.layerwise
    from spp_export.calibration.activations import TokenBatch
    from spp_export.formats.safetensors.verify import check_directory
    from spp_export.models.session import open_session

    session = open_session(str(model), layerwise=True)
    shape = session.source.shape
    plan = (narrow_plan if narrow else plan_for)(session.source)
    imports = status_bytes("RssAnon")
    with watching_memory() as while_exporting:
        start = time.perf_counter()
        spp_export.export(output=out, model=str(model), plan=plan, verify=False)
        exported = time.perf_counter() - start
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(shape.vocab_size, (ROWS, max(tokens // ROWS, 2)), generator=generator)
    batch = TokenBatch(ids, torch.ones_like(ids), tuple(range(ROWS)))
    with watching_memory() as while_checking:
        start = time.perf_counter()
        report = check_directory(out, session, plan, (), batches=[batch]).report
        checked = time.perf_counter() - start
    layer = shape.parameters((shape.layer,)) - shape.parameters(())
    embeddings = shape.vocab_size * shape.hidden_size * (1 if shape.tied_embeddings else 2)
    return {
        "source_bytes": sum(tensor.nbytes for tensor in session.source.tensors.values()),
        "slim_bytes": sum(path.stat().st_size for path in out.iterdir()),
        "layers": shape.num_layers,
        "tokens": ids.numel(),
        "checks": {check.name: check.passed for check in report.checks},
        **report.context,
        "export_seconds": round(exported, 1),
        "verify_seconds": round(checked, 1),
        "export_peak_anonymous_bytes": while_exporting["peak"],
        "verify_peak_anonymous_bytes": while_checking["peak"],
        "imports_anonymous_bytes": imports,
        "predicted_weights_bytes": 8 * resident_parameters(shape),
        "limit_bytes": 8 * (2 * layer + embeddings) + FIXED_BYTES + imports,
    }


def measure(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Build a model, and run in a fresh process."""
    model = place / "model"
    model.mkdir()
    if options.qwen2_14b:
        build_sparse(model, {**published("qwen2.5-14b").config, "dtype": "bfloat16"})
    else:
        build(model, options.gigabytes)
    result = run_fresh(run, model, place / "out", options.tokens, options.qwen2_14b)
    if "error" in result:
        raise SystemExit(result["error"])
    result["on_disk_bytes"] = sum(os.stat(path).st_blocks * 512 for path in model.iterdir())
    result["passed"] = all(result["checks"].values())
    result["within_limit"] = result["verify_peak_anonymous_bytes"] <= result["limit_bytes"]
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what was measured; 1 if a check or the limit fails."""
    made = parser(__doc__, writes=True)
    made.add_argument("--gigabytes", type=float, default=4.0, help="size of the dense model")
    made.add_argument("--qwen2-14b", action="store_true", help="that shape instead, 29.5 GB")
    made.add_argument("--tokens", type=int, default=192, help="tokens that logits are checked on")
    options = made.parse_args(arguments)
    with scratch(options) as place:
        result = measure(options, place)
    lines = []
    for name, value in result.items():
        shown = f"{value / 1e6:10.1f} MB" if name.endswith("_bytes") else value
        lines.append(f"{name.removesuffix('_bytes').replace('_', ' '):28} {shown}")
    finish(options, {"machine": machine(), "result": result}, *lines)
    return 0 if result["passed"] and result["within_limit"] else 1


if __name__ == "__main__":
    sys.exit(main())

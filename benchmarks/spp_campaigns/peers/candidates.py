"""Who exports, and how each of them is called. Imports no other exporter than our own."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from spp_bench.processes import held, peak
from spp_export.common.json_files import dump_json
from spp_export.common.manifest import write_manifest
from spp_export.common.publish import publish
from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.planning import Plan, read_plan
from spp_export.slicing.config import MODELING_FILES, slim_config
from spp_export.slicing.weights import write_slim_weights

# (dense model, plan, empty directory)
Export = Callable[[Path, Plan, Path], None]


@dataclass(frozen=True)
class Candidate:
    """An exporter: `prepare`, given the dense model, imports what it needs and returns what is
    measured. `package` is the package it needs in addition to this project."""

    name: str
    what: str
    prepare: Callable[[Path], Export]
    package: str | None = None


def export_by_spp(model: Path, plan: Plan, out: Path) -> None:
    """Our own export step: slices written, hashed, flushed and published, with the config and, for
    per-layer plans, the code that loads them."""
    source = open_source(model)
    layers = plan.layer_shapes(source.shape)
    config = slim_config(source.config, source.family, source.shape, layers, plan.layout)
    with publish(out) as work:
        written = write_slim_weights(source, plan, work)
        (work / "config.json").write_text(dump_json(config), encoding="utf-8")
        for path in MODELING_FILES if plan.layout == "per-layer" else ():
            shutil.copyfile(path, work / path.name)
        write_manifest(work, written.records)


def _transformers(model: Path) -> Export:
    from spp_campaigns.peers.in_memory import export, import_classes

    import_classes(model)
    return export


def _torch_pruning(
    model: Path,
    *,
    kv_heads: Literal["plan", "graph"],
    attention: Literal["eager", "sdpa"] = "eager",
    pickled: bool = False,
) -> Export:
    from spp_campaigns.peers.by_torch_pruning import export
    from spp_campaigns.peers.in_memory import import_classes

    import_classes(model)
    return partial(export, kv_heads=kv_heads, attention=attention, pickled=pickled)


TORCH_PRUNING = "torch-pruning"
_CANDIDATES = (
    Candidate("spp", "streams slices from safetensors to safetensors", lambda model: export_by_spp),
    Candidate("transformers", "from_pretrained, index_select, save_pretrained", _transformers),
    Candidate(
        "torch-pruning",
        "its graph, KV heads set to the plan's by hand, save_pretrained as in its LLM example",
        partial(_torch_pruning, kv_heads="plan"),
        TORCH_PRUNING,
    ),
    Candidate(
        "torch-pruning pickle",
        "the same, torch.save of the module as its README says",
        partial(_torch_pruning, kv_heads="plan", pickled=True),
        TORCH_PRUNING,
    ),
    Candidate(
        "torch-pruning graph",
        "its graph's own groups, eager attention, torch.save",
        partial(_torch_pruning, kv_heads="graph", pickled=True),
        TORCH_PRUNING,
    ),
    Candidate(
        "torch-pruning graph sdpa",
        "the same with transformers' default attention",
        partial(_torch_pruning, kv_heads="graph", attention="sdpa", pickled=True),
        TORCH_PRUNING,
    ),
)
CANDIDATES = {candidate.name: candidate for candidate in _CANDIDATES}


def export(name: str, model: Path, plan_file: Path, out: Path) -> dict[str, Any]:
    """One export in this process: seconds until the call returns and until its files are on the
    disk, and the peak resident memory above what the imports hold."""
    step = CANDIDATES[name].prepare(model)
    plan = read_plan(plan_file)
    before = held()
    start = time.perf_counter()
    step(model, plan, out)
    returned = time.perf_counter()
    most = peak()
    for path in out.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return {
        "seconds": round(returned - start, 3),
        "flushed_seconds": round(time.perf_counter() - start, 3),
        "imports_bytes": before,
        "peak_bytes": max(0, most - before),
    }

"""Our own export step: slices written, hashed, flushed and published."""

from __future__ import annotations

import shutil
from pathlib import Path

from spp_export.checkpoint.atomic import publish
from spp_export.checkpoint.manifest import write_manifest
from spp_export.checkpoint.slim import write_slim_weights
from spp_export.checkpoint.source import open_source
from spp_export.jsonio import dump_json
from spp_export.plans import Plan
from spp_export.slim_config import MODELING_FILES, slim_config


def export(model: Path, plan: Plan, out: Path) -> None:
    """Write weights, config and, for per-layer plans, the code that loads them."""
    source = open_source(model)
    layers = plan.layer_shapes(source.shape)
    config = slim_config(source.config, source.family, source.shape, layers, plan.layout)
    with publish(out) as work:
        written = write_slim_weights(source, plan, work)
        (work / "config.json").write_text(dump_json(config), encoding="utf-8")
        for path in MODELING_FILES if plan.layout == "per-layer" else ():
            shutil.copyfile(path, work / path.name)
        write_manifest(work, written.records)

"""Our own export step: slices written, hashed, flushed and published."""

from __future__ import annotations

import shutil
from pathlib import Path

from spp_export.common.json_files import dump_json
from spp_export.common.manifest import write_manifest
from spp_export.common.publish import publish
from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.planning import Plan
from spp_export.slicing.config import MODELING_FILES, slim_config
from spp_export.slicing.weights import write_slim_weights


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

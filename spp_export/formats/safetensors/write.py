"""The files of a slim checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

from spp_export.common.errors import (
    ModelError,
)
from spp_export.common.json_files import dump_json, read_json
from spp_export.common.progress import progress
from spp_export.models.checkpoint.checkpoint import TOKENIZER_FILES
from spp_export.models.checkpoint.companions import companion, terms
from spp_export.models.session import Session
from spp_export.planning import Plan
from spp_export.slicing.compensation import (
    Compensator,
    written_config,
)
from spp_export.slicing.config import MODELING_FILES
from spp_export.slicing.weights import WrittenWeights, write_slim_weights

# What a Hugging Face directory has beside weights and config, where the source has it.
COMPANIONS = (
    "generation_config.json",
    "tokenizer_config.json",
    *TOKENIZER_FILES,
)


def write_slim(
    session: Session, compiled: Plan, compensation: Compensator, work: Path
) -> WrittenWeights:
    source = session.source
    with progress("slicing", 1.0) as bar:
        written = write_slim_weights(
            source,
            compiled,
            work,
            replaced=compensation.refit,
            biases=compensation.biases(),
            progress=lambda done, total: bar(done / total),
        )
    config = written_config(source, compiled)
    (work / "config.json").write_text(dump_json(config), encoding="utf-8")
    if compiled.layout != "uniform":
        for path in MODELING_FILES:
            shutil.copyfile(path, work / path.name)
    for name in (*COMPANIONS, *terms(source.path)):
        if companion_file := companion(source.path, name):
            _copy_companion(companion_file, work / name)
    (work / "plan.json").write_text(compiled.to_json(), encoding="utf-8")
    return written


def _copy_companion(source: Path, target: Path) -> None:
    """A file as it is, but for code that a tokenizer names: whoever trusts an export's own code, as
    the card of a per-layer one says, would run that too."""
    if target.name == "tokenizer_config.json":
        settings = read_json(source, what="tokenizer config", error=ModelError)
        if isinstance(settings, dict) and "auto_map" in settings:
            del settings["auto_map"]
            target.write_text(dump_json(settings), encoding="utf-8")
            return
    shutil.copyfile(source, target)

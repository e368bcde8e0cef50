"""The files of a slim checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

from spp_export.common.json_files import dump_json
from spp_export.common.progress import progress
from spp_export.models.checkpoint.checkpoint import TOKENIZER_FILES
from spp_export.models.checkpoint.companions import copy_companions, copy_processor, terms
from spp_export.models.session import Session
from spp_export.models.tokenizer import write_companions
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
    session: Session, compiled: Plan, compensation: Compensator, work: Path, *, kept: bool = True
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
            kept=kept,
        )
    config = written_config(source, compiled)
    (work / "config.json").write_text(dump_json(config), encoding="utf-8")
    if compiled.layout != "uniform":
        for path in MODELING_FILES:
            shutil.copyfile(path, work / path.name)
    write_companions(source.path, work, config)
    copy_processor(source.path, work)
    copy_companions(source.path, terms(source.path), work)
    (work / "plan.json").write_text(compiled.to_json(), encoding="utf-8")
    return written

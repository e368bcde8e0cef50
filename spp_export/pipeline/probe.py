"""`probe`: the offline stage, once per model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from spp_export.artifacts import Artifacts, write_artifacts
from spp_export.checkpoint.atomic import check_target, publish
from spp_export.checkpoint.manifest import write_manifest
from spp_export.models import DEMO
from spp_export.pools import read_pools
from spp_export.progress import Progress, no_progress
from spp_export.session import open_session


def probe(
    pools: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    model: str = DEMO,
    domains: Sequence[str] | None = None,
    seed: int = 0,
    force: bool = False,
    device: str = "cpu",
    dtype: str | None = None,
    progress: Progress = no_progress,
) -> Artifacts:
    """Make a model's artifacts from `<pools>/<domain>/{train,val}.txt` and write them."""
    target = Path(output)
    check_target(target, force)
    texts = read_pools(Path(pools), domains)
    session = open_session(model, device=device, dtype=dtype, progress=progress)

    from spp_export.probing import probe_model

    artifacts = probe_model(
        session.model, session.tokenizer, session.source, texts, seed=seed, progress=progress
    )
    with publish(target, force) as work:
        written = write_artifacts(artifacts, work)
        write_manifest(work)
    return written

"""`artifacts import`: the published artifact layout to ours."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from spp_export.common.manifest import write_manifest
from spp_export.common.publish import check_target, publish
from spp_export.data.artifacts import Artifacts, write_artifacts
from spp_export.data.published_artifacts import import_published


def import_artifacts(
    directory: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    domains: Sequence[str] | None = None,
    force: bool = False,
) -> Artifacts:
    """Read SubspacePath Pruner's released artifacts and write them as ours.

    Pickles are read with `weights_only=True`. `domains` names the probes in their order.
    """
    target = Path(output)
    check_target(target, force)
    found = import_published(Path(directory), domains)
    with publish(target, force) as work:
        written = write_artifacts(found, work)
        write_manifest(work)
    return written

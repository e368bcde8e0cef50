"""`artifacts import`: the published artifact layout to ours."""

from __future__ import annotations

from pathlib import Path

from spp_export.commands.requests import ImportRequest
from spp_export.common.manifest import write_manifest
from spp_export.common.options import command
from spp_export.common.publish import check_target, publish
from spp_export.data.artifacts import Artifacts, write_artifacts
from spp_export.data.published_artifacts import import_published


@command(ImportRequest)
def import_artifacts(request: ImportRequest) -> Artifacts:
    """Read SubspacePath Pruner's released artifacts and write them as ours.

    Pickles are read with `weights_only=True`.

        spp_export.import_artifacts("results/ppd_pipeline", "artifacts")
    """
    target = Path(request.output)
    check_target(target, request.force)
    artifacts = import_published(Path(request.directory), request.domains)
    with publish(target, request.force) as work:
        written = write_artifacts(artifacts, work)
        write_manifest(work)
    return written

"""`probe`: the offline stage, once per model."""

from __future__ import annotations

from pathlib import Path

from spp_export.commands.needs import (
    check_disk,
    check_memory,
    check_place,
    check_readable,
    probe_needs,
)
from spp_export.commands.requests import ProbeRequest
from spp_export.common.manifest import write_manifest
from spp_export.common.options import command
from spp_export.common.publish import check_target, publish
from spp_export.data.artifacts import Artifacts, write_artifacts
from spp_export.data.pools import other_domains, read_pools
from spp_export.models.checkpoint.checkpoint import TOKENIZER_FILES
from spp_export.models.session import open_session


@command(ProbeRequest)
def probe(request: ProbeRequest) -> Artifacts:
    """Make a model's artifacts from `<pools>/<domain>/{train,val}.txt`, once per model.

    Validation text of pools that are left out stands for domains unknown.

        spp_export.probe("pools", "artifacts", model="org/name")
    """
    from spp_export.domains.probe_model import ProbeSettings, probe_model
    from spp_export.domains.scores import DEFAULT_CRITERIA

    target = Path(request.output)
    check_target(target, request.force)
    check_place(target)
    # All together, as a text left out must not be one that was trained on.
    named = read_pools(request.pools, request.domains).domains
    others = other_domains(request.pools, named)
    texts = read_pools(request.pools, (*named, *others))
    options = ProbeSettings(
        request.select, request.criteria or DEFAULT_CRITERIA, request.units, request.seed
    )
    options.check(len(named))
    session = open_session(
        request.model, device=request.device, dtype=request.dtype, layerwise=None
    )
    check_readable(session.source.path, TOKENIZER_FILES)
    needs = probe_needs(session, target, len(named))
    check_disk(needs)
    check_memory(needs)
    artifacts = probe_model(
        session.model,
        session.tokenizer,
        session.source,
        texts.take(named),
        left_out=texts.take(others),
        request=options,
    )
    with publish(target, request.force) as work:
        written = write_artifacts(artifacts, work)
        write_manifest(work)
    return written

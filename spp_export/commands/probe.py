"""`probe`: the offline stage, once per model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from spp_export.commands.needs import (
    check_disk,
    check_memory,
    check_place,
    check_readable,
    probe_needs,
)
from spp_export.common.manifest import write_manifest
from spp_export.common.publish import check_target, publish
from spp_export.data.artifacts import Artifacts, write_artifacts
from spp_export.data.pools import other_domains, read_pools
from spp_export.models.checkpoint.checkpoint import TOKENIZER_FILES
from spp_export.models.hub import DEMO
from spp_export.models.session import open_session


def probe(
    pools: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    model: str = DEMO,
    domains: Sequence[str] | None = None,
    select: int | None = None,
    criteria: Sequence[str] | None = None,
    units: str = "both",
    seed: int = 0,
    force: bool = False,
    device: str = "cpu",
    dtype: str | None = None,
) -> Artifacts:
    """Make a model's artifacts from `<pools>/<domain>/{train,val}.txt` and write them.

    `domains` names the candidates, by default every pool of the directory, and `select` takes that
    many of them. Validation text of the others stands for domains unknown. `criteria` are names
    of importance (None: energy and axis), of `units` "heads" or "both" heads and MLP channels.
    """
    target = Path(output)
    check_target(target, force)
    check_place(target)
    # All together, as a text left out must not be one that was trained on.
    named = read_pools(pools, domains).domains
    others = other_domains(pools, named)
    texts = read_pools(pools, (*named, *others))

    from spp_export.domains.probe_model import ProbeRequest, probe_model
    from spp_export.domains.scores import DEFAULT_CRITERIA

    request = ProbeRequest(select, criteria or DEFAULT_CRITERIA, units, seed)
    request.check(len(named))
    session = open_session(model, device=device, dtype=dtype, layerwise=None)
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
        request=request,
    )
    with publish(target, force) as work:
        written = write_artifacts(artifacts, work)
        write_manifest(work)
    return written

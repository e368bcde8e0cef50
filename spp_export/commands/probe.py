"""`probe`: the offline stage, once per model."""

from __future__ import annotations

from collections.abc import Sequence
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
from spp_export.common.options import PathLike, command
from spp_export.common.publish import check_target, publish
from spp_export.data.artifacts import Artifacts, open_artifacts, write_artifacts
from spp_export.data.pools import Pools, extended_pools, other_domains, read_pools
from spp_export.models.checkpoint.checkpoint import TOKENIZER_FILES
from spp_export.models.session import Session, open_session


@command(ProbeRequest)
def probe(request: ProbeRequest) -> Artifacts:
    """Make a model's artifacts from `<pools>/<domain>/{train,val}.txt`, once per model.

    Validation text of pools that are left out stands for domains unknown. `add_domain` takes the
    texts of the domains from artifacts, whose validation text they do not hold: of every domain
    each fourth text validates.

        spp_export.probe("pools", "artifacts", model="org/name")
    """
    from spp_export.domains.probe_model import ProbeSettings, probe_model
    from spp_export.domains.scores import DEFAULT_CRITERIA

    target = Path(request.output)
    check_target(target, request.force)
    check_place(target)
    pools = None if request.pools is None else _pools(request, request.pools)
    names: Sequence[str] = request.criteria or DEFAULT_CRITERIA
    if pools:
        # Before a model is fetched.
        ProbeSettings(request.select, names, request.units, request.seed).check(len(pools[1]))
    session = open_session(
        request.model,
        device=request.device,
        dtype=request.dtype,
        matmul=request.matmul,
        layerwise=None,
        dequantize=request.dequantize,
        parallel=request.parallel,
    )
    session.source.family.check_units(request.units, session.source.shape)
    if not pools:
        pools, names = _extended(request, session)
    texts, named = pools
    others = tuple(name for name in texts.domains if name not in named)
    options = ProbeSettings(
        request.select,
        names,
        request.units,
        request.seed,
        request.calibration_tokens,
        # A model that runs from disk would read all of it again for every token.
        0 if session.reads_from_disk else request.answer_tokens,
    )
    options.check(len(named))
    check_readable(session.source.path, TOKENIZER_FILES)
    needs = probe_needs(session, target, len(named))
    check_disk(needs)
    check_memory(needs)
    artifacts = probe_model(
        session.reader,
        session.tokenizer,
        session.source,
        texts.take(named),
        left_out=texts.take(others),
        request=options,
        matmul=session.matmul,
    )
    with publish(target, request.force) as work:
        written = write_artifacts(artifacts, work)
        write_manifest(work)
    return written


def _pools(request: ProbeRequest, directory: PathLike) -> tuple[Pools, tuple[str, ...]]:
    """All text, and the domains to know."""
    # All together, as a text left out must not be one that was trained on.
    named = read_pools(directory, request.domains).domains
    others = other_domains(directory, named)
    return read_pools(directory, (*named, *others)), named


def _extended(
    request: ProbeRequest, session: Session
) -> tuple[tuple[Pools, tuple[str, ...]], Sequence[str]]:
    """The domains of artifacts and more of them, and the criteria to score by."""
    base = open_artifacts(request.artifacts, request.model, session.source)
    texts = extended_pools(base.calibration, request.add_domain or {})
    scored = [name.partition("/")[2] for name in base.importance if name.startswith("head/")]
    return (texts, texts.domains), request.criteria or scored

"""Which text speaks for a scenario: the pools by diagnosed domain, and its own prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from spp_export.artifacts import Artifacts
from spp_export.errors import PlanError, UsageError
from spp_export.moments import Moments, gather
from spp_export.session import Session

# Weight of the scenario's own tokens against the pools'. The pools hold tens of thousands of
# tokens and keep a fit from chasing a scenario of two thousand.
SCENARIO_WEIGHT = 0.3
# How far the diagnosed mixture is shrunk towards all domains alike.
DOMAIN_SHRINKAGE = 0.5


def scenario_moments(
    session: Session,
    artifacts: Artifacts | None,
    mixture: Mapping[str, float] | None,
    prompts: Sequence[str],
) -> Moments:
    """Moments of the pools, domains weighted by the diagnosis, mixed with the scenario's own.

    `mixture` is the one of plan.json, so that a plan read again gives the same weights; without
    it all domains count alike. Raises UsageError where there is no text at all, PlanError for a
    mixture of other domains.
    """
    parts = _pool_parts(session, artifacts, mixture) if artifacts else []
    if prompts:
        own = _gather(session, prompts, "the scenario")
        scale = 1 - SCENARIO_WEIGHT if parts else 0.0
        parts = [(path, weight * scale) for path, weight in parts] + [(own, 1 - scale)]
    if not parts:
        raise UsageError(
            "compensation needs text: give --scenario or --artifacts, or --compensate none."
        )
    return Moments(tuple(parts))


def _pool_parts(
    session: Session, artifacts: Artifacts, mixture: Mapping[str, float] | None
) -> list[tuple[Path, float]]:
    texts = {
        domain: [text for name, text in artifacts.calibration if name == domain]
        for domain in artifacts.domains
    }
    present = [domain for domain in artifacts.domains if texts[domain]]
    if not present:
        return []
    even = 1 / len(present)
    weights = dict.fromkeys(present, even)
    if mixture is not None:
        _check_mixture(mixture, artifacts.domains)
        total = sum(mixture[domain] for domain in present)
        weights = {
            domain: DOMAIN_SHRINKAGE * even
            + (1 - DOMAIN_SHRINKAGE) * (mixture[domain] / total if total else even)
            for domain in present
        }
    return [(_gather(session, texts[domain], domain), weights[domain]) for domain in present]


def _check_mixture(mixture: Mapping[str, float], domains: Sequence[str]) -> None:
    """A plan's provenance may be edited by hand like the rest of it."""
    shares = mixture.values() if isinstance(mixture, Mapping) else ()
    sane = all(type(share) in (int, float) and 0 <= share <= 1 for share in shares)
    if not sane or not isinstance(mixture, Mapping) or set(mixture) != set(domains):
        raise PlanError(
            "plan: diagnosis.mixture must give each domain of the artifacts a share from 0 to 1; "
            f"they have {', '.join(domains)}. Use the artifacts that the plan was made with."
        )


def _gather(session: Session, texts: Sequence[str], what: str) -> Path:
    return gather(
        session.source,
        texts,
        lambda: (session.model, session.tokenizer),
        dtype=session.dtype,
        progress=session.progress,
        description=f"gathering moments: {what}",
    )

"""Which text speaks for a scenario: the pools by diagnosed domain, and its own prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spp_export.artifacts import Artifacts
from spp_export.diagnosis import Diagnosis
from spp_export.errors import UsageError
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
    diagnosis: Diagnosis | None,
    prompts: Sequence[str],
) -> Moments:
    """Moments of the pools, domains weighted by the diagnosis, mixed with the scenario's own.

    Raises UsageError where there is no text at all.
    """
    parts = _pool_parts(session, artifacts, diagnosis) if artifacts else []
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
    session: Session, artifacts: Artifacts, diagnosis: Diagnosis | None
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
    if diagnosis is not None:
        mixture = dict(zip(diagnosis.domains, diagnosis.mixture, strict=True))
        total = sum(mixture[domain] for domain in present)
        weights = {
            domain: DOMAIN_SHRINKAGE * even
            + (1 - DOMAIN_SHRINKAGE) * float(mixture[domain] / total)
            for domain in present
        }
    return [(_gather(session, texts[domain], domain), weights[domain]) for domain in present]


def _gather(session: Session, texts: Sequence[str], what: str) -> Path:
    return gather(
        session.source,
        texts,
        lambda: (session.model, session.tokenizer),
        dtype=session.dtype,
        progress=session.progress,
        description=f"gathering moments: {what}",
    )

"""The calibration text of a scenario: the pools by diagnosed domain, and its own prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spp_export.calibration.cache import require_cache_space
from spp_export.calibration.moments import Collection, Moments, gather_all
from spp_export.calibration.reading import TokenText, dialogue_text
from spp_export.common.errors import PlanError, UsageError
from spp_export.data.artifacts import Artifacts
from spp_export.models.session import Session


@dataclass(frozen=True)
class Mixing:
    """How far the diagnosed mixture is shrunk towards all domains alike, and how much the
    scenario's own tokens count against the pools', both in [0,1]."""

    shrinkage: float
    scenario_weight: float


@dataclass(frozen=True)
class WeightedTexts:
    """A text collection of a scenario's calibration, and its weight.

    domain: the one whose training pool it is, or None for the scenario's own prompts.
    """

    texts: tuple[str | TokenText, ...]
    weight: float
    domain: str | None = None

    @property
    def name(self) -> str:
        """What a progress bar calls it."""
        return self.domain or "the scenario"


def calibration_parts(
    artifacts: Artifacts | None,
    mixture: Mapping[str, float] | None,
    prompts: Sequence[TokenText],
    mixing: Mixing,
    *,
    answered: bool = True,
) -> tuple[WeightedTexts, ...]:
    """The pools, domains weighted by the diagnosis, and the scenario's own; weights sum to one.

    Of pools their dialogues are read, where the artifacts have some and prompts are `answered`.
    `mixture` is the one of plan.json, so that a plan read again gives the same weights; without
    it all domains count alike. Raises UsageError where there is no text at all, PlanError for a
    mixture of other domains.
    """
    pools = _pool_parts(artifacts, mixture, mixing.shrinkage, answered) if artifacts else []
    own = mixing.scenario_weight if pools else 1.0
    if not prompts:
        own = 0.0
    parts = [WeightedTexts(part.texts, part.weight * (1 - own), part.domain) for part in pools]
    if own > 0:
        parts.append(WeightedTexts(tuple(prompts), own))
    if not parts:
        raise UsageError(
            "compensation needs text: give --scenario or --artifacts, or --compensate none."
        )
    return tuple(parts)


def gather_collections(
    session: Session, parts: Sequence[WeightedTexts], kinds: Sequence[str]
) -> tuple[Collection, ...]:
    """Statistics of each part, from the cache or by one pass of the dense model over all that are
    missing.

    Raises OutputError where the cache has no room for these, before any pass.
    """
    require_cache_space(session, [part.texts for part in parts], kinds)
    return gather_all(
        session.source,
        [part.texts for part in parts],
        kinds,
        lambda: (session.reader, session.tokenizer),
        dtype=session.dtype,
        matmul=session.matmul,
    )


def gather_parts(session: Session, parts: Sequence[WeightedTexts], kinds: Sequence[str]) -> Moments:
    """The weighted mixture of the parts' moments; errors as of `gather_collections`."""
    collections = gather_collections(session, parts, kinds)
    weights = (part.weight for part in parts)
    return Moments(tuple(zip(collections, weights, strict=True)))


def _pool_parts(
    artifacts: Artifacts, mixture: Mapping[str, float] | None, shrinkage: float, answered: bool
) -> list[WeightedTexts]:
    texts = {domain: _pool_texts(artifacts, domain, answered) for domain in artifacts.domains}
    present = [domain for domain in artifacts.domains if texts[domain]]
    if not present:
        return []
    even = 1 / len(present)
    weights = dict.fromkeys(present, even)
    if mixture is not None:
        _check_mixture(mixture, artifacts.domains)
        total = sum(mixture[domain] for domain in present)
        weights = {
            domain: shrinkage * even
            + (1 - shrinkage) * (mixture[domain] / total if total else even)
            for domain in present
        }
    return [
        WeightedTexts(texts[domain], weights[domain], domain)
        for domain in present
        if weights[domain]
    ]


def _pool_texts(artifacts: Artifacts, domain: str, answered: bool) -> tuple[str | TokenText, ...]:
    """A domain's prompts with their answers; where there are to be none, its texts."""
    dialogues = [one for one in artifacts.dialogues if one.domain == domain]
    if answered and dialogues:
        return tuple(dialogue_text(one.tokens, one.answer, one.gradients) for one in dialogues)
    return tuple(text for name, text in artifacts.calibration if name == domain)


def _check_mixture(mixture: Mapping[str, float], domains: Sequence[str]) -> None:
    """Check the mixture of a plan's provenance, which may have been edited by hand."""
    shares = mixture.values() if isinstance(mixture, Mapping) else ()
    sane = all(type(share) in (int, float) and 0 <= share <= 1 for share in shares)
    if not sane or not isinstance(mixture, Mapping) or set(mixture) != set(domains):
        raise PlanError(
            "plan: diagnosis.mixture must give each domain of the artifacts a share from 0 to 1; "
            f"they have {', '.join(domains)}. Use the artifacts that the plan was made with."
        )

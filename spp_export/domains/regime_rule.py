"""The thresholds that tell the regimes apart, fitted on scenarios made of held-out text.

A scenario is a few prompts. In-domain ones are of one domain's text, out-of-domain ones of a domain
that the probes do not know. Cross-domain ones come in two kinds: prompts of several domains, each
of one, and prompts that join texts of several. To the probes, which know whole texts of one domain,
the latter look much like text of none, and are told from it only in part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from spp_export.domains.temperatures import FloatArray, IntArray

from spp_export.data.artifacts import KNOWN, SHARE
from spp_export.domains.diagnosis import CROSS_DOMAIN, IN_DOMAIN, OUT_OF_DOMAIN, choose_regime

PROMPTS = 4
_JOINED = "cross-domain, joined prompts"
_REGIME = {
    IN_DOMAIN: IN_DOMAIN,
    CROSS_DOMAIN: CROSS_DOMAIN,
    _JOINED: CROSS_DOMAIN,
    OUT_OF_DOMAIN: OUT_OF_DOMAIN,
}
_GRID_KNOWN = np.round(np.arange(0.05, 0.951, 0.05), 2)
_GRID_SHARE = np.round(np.arange(0.05, 0.451, 0.05), 2)

Scenarios = Sequence[FloatArray]


@dataclass(frozen=True)
class RegimeRule:
    """Thresholds of `choose_regime`, and what it answers on scenarios of held-out text.

    counts[kind of scenario][regime chosen]; cross-fitted: every second scenario is judged by
    thresholds fitted on the others, and the other way round.
    """

    known: float
    share: float
    counts: Mapping[str, Mapping[str, int]]

    def as_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "known": self.known,
            "share": self.share,
            "prompts_per_scenario": PROMPTS,
            "counts": self.counts,
        }


def fit_rule(text: Mapping[str, tuple[FloatArray, IntArray]], seed: int = 0) -> RegimeRule:
    """Thresholds with the highest mean recall over regimes.

    `text` has the probabilities [N,K] of the texts of each regime and the groups [N] that they
    form scenarios within. A threshold that no text speaks for keeps its default; among equals the
    nearest to it wins.
    """
    kinds = _scenarios(text, seed)
    counts = {kind: dict.fromkeys((IN_DOMAIN, CROSS_DOMAIN, OUT_OF_DOMAIN), 0) for kind in kinds}
    for fold in (0, 1):
        known, share = _thresholds({kind: made[1 - fold :: 2] for kind, made in kinds.items()})
        for kind, made in kinds.items():
            for scenario in made[fold::2]:
                counts[kind][choose_regime(scenario, known, share)] += 1
    return RegimeRule(*_thresholds(kinds), counts)


def _scenarios(text: Mapping[str, tuple[FloatArray, IntArray]], seed: int) -> dict[str, Scenarios]:
    """Scenarios [P,K] of every kind that there is text for."""
    kinds: dict[str, Scenarios] = {}
    for regime, (probabilities, groups) in text.items():
        made = list(_runs(probabilities, groups))
        kinds[_JOINED if regime == CROSS_DOMAIN else regime] = made
        if regime == IN_DOMAIN and len(np.unique(groups)) > 1:
            kinds[CROSS_DOMAIN] = list(_mixed(probabilities, groups, len(made), seed))
    return kinds


def _runs(probabilities_NK: FloatArray, groups_N: IntArray) -> Iterator[FloatArray]:
    """PROMPTS texts of a group at a time; the last of a group may be fewer."""
    for group in np.unique(groups_N):
        members = probabilities_NK[groups_N == group]
        for start in range(0, len(members), PROMPTS):
            yield members[start : start + PROMPTS]


def _mixed(
    probabilities_NK: FloatArray, groups_N: IntArray, count: int, seed: int
) -> Iterator[FloatArray]:
    """PROMPTS texts of two or three groups, from each at least one."""
    generator = np.random.default_rng(seed)
    groups = np.unique(groups_N)
    for number in range(count):
        size = min(2 + number % 2, len(groups))
        chosen = generator.choice(groups, size, replace=False)
        of = [*chosen, *generator.choice(chosen, PROMPTS - size)]
        rows = [int(generator.choice(np.flatnonzero(groups_N == group))) for group in of]
        yield probabilities_NK[rows]


def _thresholds(kinds: Mapping[str, Scenarios]) -> tuple[float, float]:
    seen: dict[str, list[FloatArray]] = {}
    for kind, made in kinds.items():
        seen.setdefault(_REGIME[kind], []).extend(_evidence(scenario) for scenario in made)
    evidence = {regime: np.array(rows) for regime, rows in seen.items() if rows}
    knowns = _GRID_KNOWN if OUT_OF_DOMAIN in evidence else np.array([KNOWN])
    shares = _GRID_SHARE if CROSS_DOMAIN in evidence else np.array([SHARE])
    best, reached = (KNOWN, SHARE), (-1.0, 0.0)
    for known in knowns if evidence else ():
        for share in shares:
            recall = np.mean([_recall(r, rows, known, share) for r, rows in evidence.items()])
            # Rounded, so that recalls that are equal but for the order of a sum stay equal.
            value = (round(float(recall), 9), -abs(known - KNOWN) - abs(share - SHARE))
            if value > reached:
                best, reached = (float(known), float(share)), value
    return best


def _evidence(scenario_PK: FloatArray) -> FloatArray:
    """What `choose_regime` compares with its thresholds: the mean of the prompts' highest
    probabilities, and the second largest share of the mixture."""
    mean_K = scenario_PK.mean(axis=0)
    second = np.sort(mean_K)[-2] / mean_K.sum() if len(mean_K) > 1 else 0.0
    return np.array([scenario_PK.max(axis=1).mean(), second])


def _recall(regime: str, evidence_S2: FloatArray, known: float, share: float) -> float:
    """Share of scenarios whose regime is found."""
    known_S, several_S = evidence_S2[:, 0] >= known, evidence_S2[:, 1] >= share
    found = {
        OUT_OF_DOMAIN: ~known_S,
        CROSS_DOMAIN: known_S & several_S,
        IN_DOMAIN: known_S & ~several_S,
    }
    return float(found[regime].mean())

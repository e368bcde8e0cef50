"""Held-out text of the three regimes, and the rule that tells them apart, fitted on it.

In-domain text is one domain's validation text; cross-domain text joins validation texts of two or
three domains; out-of-domain text is the validation text of candidates left out of the probes. The
thresholds of `choose_regime` are `fit_rule`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spp_export.common.arrays import FloatArray, IntArray
from spp_export.data.artifacts import KNOWN, SHARE
from spp_export.domains.diagnosis import CROSS_DOMAIN, IN_DOMAIN, OUT_OF_DOMAIN, choose_regime

# Prompts of a scenario.
PROMPTS = 4
# Of a measure of calibration.
BINS = 10
# Temperatures between which the best is searched for, and the steps of the search.
_LOWEST, _HIGHEST, _STEPS = 0.05, 20.0, 60
_GRID_KNOWN = np.round(np.arange(0.05, 0.951, 0.05), 2)
_GRID_SHARE = np.round(np.arange(0.05, 0.451, 0.05), 2)
Scenarios = Sequence[FloatArray]
_JOINED = "cross-domain, joined prompts"
_REGIME = {
    IN_DOMAIN: IN_DOMAIN,
    CROSS_DOMAIN: CROSS_DOMAIN,
    _JOINED: CROSS_DOMAIN,
    OUT_OF_DOMAIN: OUT_OF_DOMAIN,
}
# Joined texts per domain, and in all; a joined text is as long as its parts together.
_PER_DOMAIN, _MOST = 16, 96
_JOINT = "\n\n"


@dataclass(frozen=True)
class Joined:
    """Texts made of several domains' [J], and which: targets [J,K] of 0 and 1."""

    texts: tuple[str, ...]
    targets: FloatArray


def join_texts(held_out: Sequence[Sequence[str]], seed: int) -> Joined:
    """Held-out texts of two or three different domains each, joined in a random order.

    Runs of PROMPTS texts are of the same domains, so that each can stand for a scenario, and every
    domain comes first alike often or once more. None for fewer than two domains.
    """
    domains = len(held_out)
    if domains < 2:
        return Joined((), np.zeros((0, domains)))
    generator = np.random.default_rng(seed)
    count = min(_PER_DOMAIN * domains, _MOST)
    texts, targets = [], np.zeros((count, domains))
    for number in range(count):
        run = number // PROMPTS
        if number % PROMPTS == 0:
            others = [k for k in range(domains) if k != run % domains]
            more = generator.choice(others, min(1 + run // domains % 2, len(others)), replace=False)
            members = [run % domains, *(int(k) for k in more)]
        targets[number, members] = 1.0
        order = [members[i] for i in generator.permutation(len(members))]
        parts = [held_out[k][int(generator.integers(len(held_out[k])))] for k in order]
        texts.append(_JOINT.join(parts))
    return Joined(tuple(texts), targets)


@dataclass(frozen=True)
class RegimeText:
    """Held-out text of a regime: logits [N,L,K], targets [N,K], and which texts belong together
    [N], as of one domain or of the same ones."""

    logits: FloatArray
    targets: FloatArray
    groups: IntArray


# Why a regime may have no text.
_ABSENT = {
    CROSS_DOMAIN: "no two domains to join texts of",
    OUT_OF_DOMAIN: "no candidate domain is left out of the probes",
}


@dataclass(frozen=True)
class Calibration:
    """Regimes that have text [R], their temperatures [R,L], and what the manifest says of them."""

    regimes: tuple[str, ...]
    temperature: FloatArray
    manifest: Mapping[str, Any]


def calibrate(text: Mapping[str, RegimeText], seed: int = 0) -> Calibration:
    """Temperatures, reliability and the rule of the regimes from their held-out text, in-domain
    first. A regime of no text is absent. The rule's scenarios are drawn with `seed`.
    """
    present = {name: of_regime for name, of_regime in text.items() if len(of_regime.targets)}
    temperature = np.stack([fit_temperatures(t.logits, t.targets) for t in present.values()])
    # The regime is chosen at the temperatures of in-domain text.
    scale = temperature[0].astype(np.float64)[None, :, None]
    rule = fit_rule(
        {
            name: (
                np.exp(-np.logaddexp(0.0, -of_regime.logits / scale)).mean(axis=1),
                of_regime.groups,
            )
            for name, of_regime in present.items()
        },
        seed,
    )
    measured = {
        name: reliability(of_regime.logits, of_regime.targets)
        if name in present
        else {"absent": _ABSENT[name]}
        for name, of_regime in text.items()
    }
    how = f"one-vs-rest, {BINS} bins of equal width, cross-fitted halves, mean over layers"
    manifest = {"reliability": {"measure": how, **measured}, "regime_choice": rule.to_dict()}
    return Calibration(tuple(present), temperature, manifest)


def fit_temperatures(logits_NLK: FloatArray, targets_NK: FloatArray) -> FloatArray:
    """One temperature per layer [L] that minimises the one-vs-rest loss on held-out text.

    `targets_NK` holds 1 where a text is of a domain; any number of them in a row, or none. After
    Guo et al., "On Calibration of Modern Neural Networks", arXiv 1706.04599. The loss is convex in
    1/T, so a golden-section search over log T from 0.05 to 20 finds its minimum.
    """
    logits = logits_NLK.astype(np.float64)

    def loss(log_t_L: FloatArray) -> FloatArray:
        scaled = logits / np.exp(log_t_L)[None, :, None]
        value = np.logaddexp(0.0, scaled) - targets_NK[:, None, :] * scaled
        result: FloatArray = value.mean(axis=(0, 2))
        return result

    ratio = (5**0.5 - 1) / 2
    low = np.full(logits.shape[1], np.log(_LOWEST))
    high = np.full(logits.shape[1], np.log(_HIGHEST))
    for _ in range(_STEPS):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        lower = loss(left) <= loss(right)
        low, high = np.where(lower, low, left), np.where(lower, right, high)
    temperature: FloatArray = np.exp((low + high) / 2).astype(np.float32)
    return temperature


def calibration_error(probabilities_N: FloatArray, outcomes_N: FloatArray) -> float:
    """Expected calibration error of probabilities against outcomes of 0 or 1.

    Ten bins of equal width over [0,1]; the mean over all values of |mean probability - share of
    ones| in its bin (Naeini et al. 2015; arXiv 1706.04599, Eq. 3).
    """
    bins = np.minimum((probabilities_N * BINS).astype(np.intp), BINS - 1)
    gap = np.bincount(bins, weights=probabilities_N - outcomes_N, minlength=BINS)
    return float(np.abs(gap).sum() / len(probabilities_N))


def reliability(logits_NLK: FloatArray, targets_NK: FloatArray) -> dict[str, Any]:
    """Calibration error before (T = 1) and after scaling, the mean over layers.

    All one-vs-rest probabilities of a layer count alike. Cross-fitted: a temperature fitted on
    every second text is judged on the others, and the other way round.
    """
    fold_N = np.arange(len(logits_NLK)) % 2
    if len(logits_NLK) < 2:
        return {"texts": len(logits_NLK)}
    before: list[float] = []
    after: list[float] = []
    for fold in (0, 1):
        judged = fold_N == fold
        temperature_L = fit_temperatures(logits_NLK[~judged], targets_NK[~judged])
        for errors, scale_L in ((before, np.ones_like(temperature_L)), (after, temperature_L)):
            errors.append(_mean_error(logits_NLK[judged], targets_NK[judged], scale_L))
    return {
        "texts": len(logits_NLK),
        "ece_before": round(float(np.mean(before)), 6),
        "ece_after": round(float(np.mean(after)), 6),
    }


def _mean_error(logits_NLK: FloatArray, targets_NK: FloatArray, scale_L: FloatArray) -> float:
    scaled = logits_NLK.astype(np.float64) / scale_L[None, :, None]
    probabilities = np.exp(-np.logaddexp(0.0, -scaled))
    outcomes = targets_NK.reshape(-1)
    errors = [
        calibration_error(probabilities[:, layer].reshape(-1), outcomes)
        for layer in range(len(scale_L))
    ]
    return float(np.mean(errors))


@dataclass(frozen=True)
class RegimeRule:
    """Thresholds of `choose_regime`, and what it answers on scenarios of held-out text.

    counts[kind of scenario][regime chosen]; cross-fitted: every second scenario is judged by
    thresholds fitted on the others, and the other way round.
    """

    known: float
    share: float
    counts: Mapping[str, Mapping[str, int]]

    def to_dict(self) -> dict[str, Any]:
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
    """Share of scenarios whose regime is recognised."""
    known_S, several_S = evidence_S2[:, 0] >= known, evidence_S2[:, 1] >= share
    chosen = {
        OUT_OF_DOMAIN: ~known_S,
        CROSS_DOMAIN: known_S & several_S,
        IN_DOMAIN: known_S & ~several_S,
    }
    return float(chosen[regime].mean())

"""Whether a scenario is text of the kind that the probes were made on at all.

Probes tell domains apart; of text of another kind they answer all the same. So the pooled residual
stream of training text is described by a Gaussian per domain with one covariance for all (Lee et
al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks",
arXiv 1807.03888), and the covariance by its largest directions and a level for the rest (Tipping
and Bishop, "Probabilistic Principal Component Analysis", 1999). A scenario is unfamiliar where its
distance is beyond what scenarios of validation text have.

The mean over few tokens lies farther out than the mean over many: the variance of a mean falls as
one over their number. How fast is measured on the beginnings of the validation texts, and a text is
judged by what known text of its length has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from spp_export.common.arrays import FloatArray, IntArray
from spp_export.data.artifacts import Artifacts

# Layers at these shares of the depth: first ones see words, last ones the next token.
_DEPTHS = (0.25, 0.5, 0.75)
_DIRECTIONS = 32
# Deviations of the mean distance of as many validation texts from which a scenario is unfamiliar:
# one in 200 would be, if the mean were normal. Scenarios are other text than pools, and may be
# farther by a factor: with the default model, scenarios of known domains have 0.56 to 0.77 of the
# distance that makes them unfamiliar (`spp diagnose --json`), and tests/demo has text beyond it.
_DEVIATIONS, _ROOM = 2.6, 1.15
# Tokens of the beginnings of texts, as a short question has.
BEGINNING = 16
# Sizes of scenarios that false alarms are counted on, and how many of each are drawn.
_PROMPTS, _DRAWN = (1, 4, 16), 400
_SMALLEST = 1e-6


@dataclass(frozen=True, eq=False)
class Familiar:
    """The text that probes of K domains were made on, at P layers.

    layers [P]      of the model
    means [P,K,d]   of each domain's pooled stream
    basis [P,r,d]   orthonormal directions of most variance within domains
    scales [P,r+1]  standard deviations along them, and along every other direction
    centre, spread  mean and standard deviation of the distances of validation texts
    growth          what a text's square distance gains for every unit of 1/tokens
    length          tokens from which it does not: the harmonic mean of the validation texts'
    """

    layers: tuple[int, ...]
    means: FloatArray
    basis: FloatArray
    scales: FloatArray
    centre: float
    spread: float
    growth: float = 0.0
    length: float = 1.0

    @classmethod
    def of(cls, artifacts: Artifacts) -> Familiar | None:
        """The one that artifacts hold; None where they do not say what text they know."""
        known = artifacts.familiarity
        if known is None:
            return None
        return cls(
            known.layers,
            **artifacts.familiar,
            centre=known.centre,
            spread=known.spread,
            growth=known.growth,
            length=known.length,
        )

    def arrays(self) -> dict[str, FloatArray]:
        """What artifacts hold of it beside their manifest."""
        return {"means": self.means, "basis": self.basis, "scales": self.scales}

    def distances(self, pooled_NLd: FloatArray) -> FloatArray:
        """Distance [N] of each text to its nearest domain: the root of the mean square deviation
        along all directions, in standard deviations, averaged over layers; about 1 for text like
        the training text."""
        distances = [
            _distances(pooled_NLd[:, layer].astype(np.float64), *parts)
            for layer, *parts in zip(self.layers, self.means, self.basis, self.scales, strict=True)
        ]
        mean: FloatArray = np.mean(distances, axis=0)
        return mean

    def distance(self, pooled_NLd: FloatArray, tokens_N: IntArray) -> float:
        """Distance of a scenario of N prompts, of so many tokens each, as a share of where it is
        unfamiliar: from 1 on it is."""
        shares_N = self.distances(pooled_NLd) / self.expected(tokens_N)
        return float(shares_N.mean() / self.limit(len(shares_N)))

    def expected(self, tokens_N: IntArray) -> FloatArray:
        """Mean distance [N] of known texts of so many tokens."""
        shorter_N = (1 / tokens_N.clip(min=1) - 1 / self.length).clip(min=0)
        expected: FloatArray = np.sqrt(self.centre**2 + self.growth * shorter_N)
        return expected

    def limit(self, prompts: int) -> float:
        """Mean share of the expected distance from which so many prompts are unfamiliar."""
        return _ROOM * (1 + _DEVIATIONS * self.spread / self.centre / math.sqrt(prompts))


@dataclass(frozen=True, eq=False)
class Beginnings:
    """The first tokens of validation texts: their pooled stream [M,L,d], the domain [M] that each
    is of, how many tokens [M] were read, and how many [M] the text has."""

    pooled: FloatArray
    labels: IntArray
    tokens: IntArray
    of: IntArray


def _distances(
    pooled_Nd: FloatArray, means_Kd: FloatArray, basis_rd: FloatArray, scales: FloatArray
) -> FloatArray:
    off_NKd = pooled_Nd[:, None] - means_Kd
    along_NKr = off_NKd @ basis_rd.T.astype(np.float64)
    rest_NK = (off_NKd**2).sum(2) - (along_NKr**2).sum(2)
    squares_NK = ((along_NKr / scales[:-1]) ** 2).sum(2) + rest_NK.clip(min=0) / scales[-1] ** 2
    distances: FloatArray = np.sqrt(squares_NK.min(axis=1) / pooled_Nd.shape[1])
    return distances


def fit_familiar(
    train: FloatArray,
    labels: IntArray,
    held_out: FloatArray,
    held_out_labels: IntArray,
    beginnings: Beginnings,
    domains: int,
    seed: int = 0,
) -> tuple[Familiar, dict[str, Any]]:
    """From pooled training text [N,L,d] and validation text [M,L,d] of `domains` domains, with the
    domain that each is of [N], [M], and the beginnings of the validation text; and what the
    manifest says of it."""
    count = train.shape[1]
    layers = tuple(sorted({min(round(depth * count), count - 1) for depth in _DEPTHS}))
    parts = [_fit_layer(train[:, layer].astype(np.float64), labels, domains) for layer in layers]
    means, basis, scales = (
        np.stack(of_layers).astype(np.float32) for of_layers in zip(*parts, strict=True)
    )
    model = Familiar(layers, means, basis, scales, 0.0, 0.0)
    distances = model.distances(held_out)
    first = model.distances(beginnings.pooled)
    model = _placed(model, distances)
    model = _with_growth(model, first, beginnings)
    record = {
        "layers": list(layers),
        "centre": model.centre,
        "spread": model.spread,
        "growth": model.growth,
        "length": model.length,
        "false_alarms": _false_alarms(model, distances, held_out_labels, seed),
        "false_alarms_of_beginnings": _false_alarms(
            model,
            first * model.centre / model.expected(beginnings.tokens),
            beginnings.labels,
            seed,
        ),
    }
    return model, record


def _placed(model: Familiar, distances: FloatArray) -> Familiar:
    """The same with centre and spread of these distances of validation texts."""
    centre, spread = (round(float(value), 6) for value in (distances.mean(), distances.std()))
    return replace(model, centre=centre, spread=spread)


def _with_growth(model: Familiar, first_M: FloatArray, beginnings: Beginnings) -> Familiar:
    """The same with what the distances of beginnings show."""
    counts = beginnings.tokens, beginnings.of
    cut, whole = (float((1 / tokens_M.clip(min=1)).mean()) for tokens_M in counts)
    gained = float(first_M.mean()) ** 2 - model.centre**2
    growth = gained / (cut - whole) if gained > 0 and cut > whole else 0.0
    return replace(model, growth=round(growth, 6), length=round(1 / whole, 6))


def _false_alarms(
    model: Familiar, distances_M: FloatArray, labels_M: IntArray, seed: int
) -> dict[str, float]:
    """Share of scenarios of one domain's validation texts that are unfamiliar, by their number of
    prompts; each half of the texts is judged by the other."""
    generator = np.random.default_rng(seed)
    halves = [np.arange(len(distances_M)) % 2 == half for half in (0, 1)]
    rates = {}
    for prompts in _PROMPTS:
        alarms = []
        for judged in halves:
            if judged.all() or not judged.any():
                continue
            placed = _placed(model, distances_M[~judged])
            limit = placed.centre * placed.limit(prompts)
            groups = [distances_M[judged & (labels_M == k)] for k in np.unique(labels_M[judged])]
            for number in range(_DRAWN // 2):
                drawn = generator.choice(groups[number % len(groups)], prompts)
                alarms.append(drawn.mean() >= limit)
        rates[str(prompts)] = round(float(np.mean(alarms)), 4) if alarms else 0.0
    return rates


def _fit_layer(
    pooled_Nd: FloatArray, labels_N: IntArray, domains: int
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Means [K,d], basis [r,d] and scales [r+1] of one layer."""
    means_Kd = np.stack([pooled_Nd[labels_N == k].mean(axis=0) for k in range(domains)])
    within_Nd = pooled_Nd - means_Kd[labels_N]
    texts, width = within_Nd.shape
    freedom = max(texts - domains, 1)
    _, singular, directions = np.linalg.svd(within_Nd, full_matrices=False)
    count = max(min(_DIRECTIONS, freedom // 4, width - 1), 1)
    variances = singular**2 / freedom
    rest = variances[count:].sum() / max(width - count, 1)
    scales = np.sqrt(np.append(variances[:count], rest)).clip(min=_SMALLEST)
    return means_Kd, directions[:count], scales

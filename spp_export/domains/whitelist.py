"""The whitelist: heads that matter alike in every domain, confirmed against a permuted control.

Two conditions, both necessary. The rule is an effect size: the in-layer z-score of energy is high
on average over domains and varies little. The test asks whether that could come about by chance:
with the heads of every (domain, layer) permuted, domains agree on nothing. The statistic is the
mean over domains of the z-score less its deviation; its p-value is the share of permuted heads of
the same layer that reach it, and Benjamini and Hochberg's step-up procedure (1995) over all heads
of the model bounds the expected share of false discoveries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spp_export.common.arrays import BoolArray, FloatArray

# At least this far above its layer's mean, on average over domains and in standard deviations of
# the layer, and varying over domains by no more than this.
MEAN, DEVIATION = 1.5, 0.25
RATE = 0.01
PERMUTATIONS = 10_000
# Permuted heads that are held at once, over all domains.
_BLOCK = 1 << 22
FEWEST_DOMAINS = 3


@dataclass(frozen=True)
class Whitelist:
    """Heads (layer, head) that every plan keeps, and how they were found.

    by_rule and confirmed count heads under either condition alone, of `units` in all; expected is
    how many heads of a permuted model meet both; smallest is the least p-value there can be.
    """

    heads: tuple[tuple[int, int], ...]
    by_rule: int
    confirmed: int
    expected: float
    smallest: float
    units: int
    domains: int
    permutations: int

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        held = len(self.heads)
        report: dict[str, Any] = {
            "units": held,
            "rule": f"z-score of energy inside the layer: mean over domains >= {MEAN}, "
            f"deviation over domains <= {DEVIATION}",
            "test": "mean less deviation over domains of that z-score, against heads permuted "
            "within each domain and layer; Benjamini-Hochberg over all heads",
            "permutations": self.permutations,
            "false_discovery_rate": RATE,
            "expected_by_chance": round(self.expected, 6),
            "empirical_false_discovery_rate": round(self.expected / held, 6) if held else None,
            "units_by_rule": self.by_rule,
            "units_confirmed": self.confirmed,
        }
        needed = RATE * max(self.by_rule, 1) / self.units
        if self.domains < FEWEST_DOMAINS or self.smallest > needed:
            report["note"] = (
                f"heads of {self.domains} domains agree by chance with a probability of "
                f"{self.smallest:.2g} at best; confirming what the rule finds takes {needed:.2g}, "
                "so that the whitelist may hold less than it should"
            )
        return report


def choose_whitelist(
    importance_KLH: FloatArray,
    seed: int = 0,
    permutations: int = PERMUTATIONS,
    *,
    layers: Sequence[int] | None = None,
) -> Whitelist:
    """Heads that meet the rule and that the test confirms, of an energy-like score [K,L,H].

    layers: those that have heads; None where all have.
    """
    layers = range(importance_KLH.shape[1]) if layers is None else layers
    importance_KLH = importance_KLH[:, list(layers)]
    z_KLH = _standardised(importance_KLH)
    statistic_LH, rule_LH = _statistic(z_KLH)
    p_LH = np.empty_like(statistic_LH)
    by_chance: list[FloatArray] = []
    generator = np.random.default_rng(seed)
    for layer in range(p_LH.shape[0]):
        null, passing = _permuted(z_KLH[:, layer], permutations, generator)
        p_LH[layer] = _p_values(statistic_LH[layer], null)
        by_chance.append(_p_values(null[passing], null))
    cut = _step_up(p_LH.reshape(-1), RATE)
    confirmed_LH = p_LH <= cut
    held = rule_LH & confirmed_LH
    return Whitelist(
        heads=tuple((int(layers[row]), int(head)) for row, head in np.argwhere(held)),
        by_rule=int(rule_LH.sum()),
        confirmed=int(confirmed_LH.sum()),
        expected=float((np.concatenate(by_chance) <= cut).sum() / permutations),
        smallest=float(importance_KLH.shape[2]) ** -len(importance_KLH),
        units=p_LH.size,
        domains=len(importance_KLH),
        permutations=permutations,
    )


def _standardised(importance_KLH: FloatArray) -> FloatArray:
    mean = importance_KLH.mean(axis=2, keepdims=True, dtype=np.float64)
    deviation = importance_KLH.std(axis=2, keepdims=True, dtype=np.float64)
    z: FloatArray = (importance_KLH - mean) / np.where(deviation > 0, deviation, 1.0)
    return z


def _statistic(z_Kn: FloatArray) -> tuple[FloatArray, BoolArray]:
    """The test's statistic and the rule's verdict, over the first axis."""
    mean, deviation = z_Kn.mean(axis=0), z_Kn.std(axis=0)
    return mean - deviation, (mean >= MEAN) & (deviation <= DEVIATION)


def _permuted(
    z_KH: FloatArray, permutations: int, generator: np.random.Generator
) -> tuple[FloatArray, BoolArray]:
    """Statistics of all permuted heads of a layer, ascending, and which of them meet the rule."""
    domains, heads = z_KH.shape
    statistics, passing = [], []
    step = max(1, _BLOCK // (domains * heads))
    for start in range(0, permutations, step):
        count = min(step, permutations - start)
        # Which head stands where, of each domain by itself: [K, count, H].
        order = generator.random((domains, count, heads), dtype=np.float32).argsort(axis=2)
        shuffled = np.take_along_axis(z_KH[:, None, :], order, axis=2)
        statistic, rule = _statistic(shuffled.reshape(domains, -1))
        statistics.append(statistic)
        passing.append(rule)
    null, rule = np.concatenate(statistics), np.concatenate(passing)
    ascending = np.argsort(null, kind="stable")
    return null[ascending], rule[ascending]


def _p_values(statistic_n: FloatArray, null_ascending: FloatArray) -> FloatArray:
    """Share of the null at or above each value; the value itself counts as one of them."""
    # Sums of the same numbers in another order differ in their last bits, and are equal here.
    below = np.searchsorted(null_ascending, statistic_n - 1e-9, side="left")
    p: FloatArray = (1 + len(null_ascending) - below) / (1 + len(null_ascending))
    return p


def _step_up(p_n: FloatArray, rate: float) -> float:
    """The largest p-value that Benjamini and Hochberg's procedure rejects; below all for none."""
    ascending = np.sort(p_n)
    passing = ascending <= rate * np.arange(1, len(p_n) + 1) / len(p_n)
    return float(ascending[np.flatnonzero(passing)[-1]]) if passing.any() else -1.0

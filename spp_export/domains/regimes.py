"""Held-out text of the three regimes, and the rule that tells them apart, fitted on it.

In-domain text is one domain's validation text; cross-domain text joins validation texts of two or
three domains; out-of-domain text is the validation text of candidates left out of the probes. The
rule that chooses a regime is `regime_rule`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spp_export.domains.diagnosis import CROSS_DOMAIN, OUT_OF_DOMAIN
from spp_export.domains.regime_rule import PROMPTS, fit_rule
from spp_export.domains.temperatures import (
    BINS,
    FloatArray,
    IntArray,
    fit_temperatures,
    reliability,
)

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
    present = {name: one for name, one in text.items() if len(one.targets)}
    temperature = np.stack([fit_temperatures(t.logits, t.targets) for t in present.values()])
    # The regime is chosen at the temperatures of in-domain text.
    scale = temperature[0].astype(np.float64)[None, :, None]
    rule = fit_rule(
        {
            name: (np.exp(-np.logaddexp(0.0, -one.logits / scale)).mean(axis=1), one.groups)
            for name, one in present.items()
        },
        seed,
    )
    found = {
        name: reliability(one.logits, one.targets) if name in present else {"absent": _ABSENT[name]}
        for name, one in text.items()
    }
    how = f"one-vs-rest, {BINS} bins of equal width, cross-fitted halves, mean over layers"
    manifest = {"reliability": {"measure": how, **found}, "regime_choice": rule.as_json()}
    return Calibration(tuple(present), temperature, manifest)

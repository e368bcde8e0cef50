"""What a scenario is about: pooled activations and the model's probes to a domain mixture."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from spp_export.calibration.reading import Text, scenario_text
from spp_export.common.arrays import FloatArray, IntArray
from spp_export.common.errors import ArtifactsError, ScenarioError, UsageError
from spp_export.common.options import DEFAULT_CALIBRATION_TOKENS
from spp_export.data.artifacts import KNOWN, SHARE, Artifacts
from spp_export.data.scenario import Scenario
from spp_export.domains.familiar import Familiar
from spp_export.models.session import Session

_log = logging.getLogger(__name__)
IN_DOMAIN = "in-domain"
CROSS_DOMAIN = "cross-domain"
OUT_OF_DOMAIN = "out-of-domain"


@dataclass(frozen=True)
class Diagnosis:
    """A scenario seen through the probes.

    probabilities [P,K]  one-vs-rest probabilities per probed layer, averaged over prompts
    layers [P]           those layers; imported artifacts may not have a probe in every one
    q [K]                their mean over layers (SubspacePath Pruner, Eq. 6)
    mixture [K]          q / sum(q): the weights that importance is mixed with; all alike where the
                         text is unfamiliar, of which probes know nothing
    distance             how far the text is from what the probes were made on, as a share of what
                         makes it unfamiliar; None where the artifacts cannot tell
    held_out             prompts of the scenario that had no part in this
    breadth              c = H(mixture) / log K in [0,1]; 0 for a single domain
    tokens               how many were read, and of how many
    """

    domains: tuple[str, ...]
    probabilities: FloatArray
    regime: str
    prompts: int
    layers: tuple[int, ...]
    distance: float | None = None
    held_out: int = 0
    tokens: Mapping[str, int] | None = None

    @property
    def unfamiliar(self) -> bool:
        """Whether the text is of another kind than all that the probes were made on."""
        return self.distance is not None and self.distance >= 1

    @property
    def q(self) -> FloatArray:
        """Mean probability per domain [K]."""
        mean: FloatArray = self.probabilities.mean(axis=0)
        return mean

    @property
    def mixture(self) -> FloatArray:
        """Weights per domain [K], summing to one."""
        q = np.ones_like(self.q) if self.unfamiliar else self.q
        weights: FloatArray = q / q.sum()
        return weights

    @property
    def shares(self) -> dict[str, float]:
        """The mixture by domain, as it is recorded and as it weighs calibration text."""
        return _named(self.domains, self.mixture)

    @property
    def breadth(self) -> float:
        """Normalised entropy of the mixture."""
        if len(self.domains) < 2:
            return 0.0
        weights = self.mixture[self.mixture > 0]
        entropy = float(-(weights * np.log(weights)).sum())
        return min(max(0.0, entropy / math.log(len(self.domains))), 1.0)

    def to_dict(self, *, layers: bool = False) -> dict[str, Any]:
        """For plan.json and `--json`; `layers` adds the per-layer probabilities."""
        report: dict[str, Any] = {
            "prompts": self.prompts,
            "mixture": self.shares,
            "probability": _named(self.domains, self.q),
            "breadth": round(self.breadth, 6),
            "regime": self.regime,
            "held_out": self.held_out,
        }
        if self.distance is not None:
            report |= {"distance": round(self.distance, 4), "unfamiliar": self.unfamiliar}
        if self.tokens is not None:
            report["tokens"] = dict(self.tokens)
        if layers:
            rows = zip(self.layers, self.probabilities, strict=True)
            # A list, as the keys of a JSON object would make strings of the layers.
            report["layers"] = [
                {"layer": i, "probability": _named(self.domains, row)} for i, row in rows
            ]
        return report


def _named(domains: tuple[str, ...], values: FloatArray) -> dict[str, float]:
    # Six digits: what decided the plan, without the noise of another machine's last bits.
    return {d: round(float(v), 6) for d, v in zip(domains, values, strict=True)}


def check_regime(artifacts: Artifacts, regime: str) -> None:
    """UsageError for a regime that the artifacts have no temperatures for."""
    if regime not in artifacts.regimes:
        raise UsageError(
            f"regime {regime!r} is not in these artifacts; they have "
            f"{', '.join(artifacts.regimes)}."
        )


def probe_probabilities(
    pooled_NLd: FloatArray, artifacts: Artifacts, regime: str = IN_DOMAIN
) -> FloatArray:
    """Calibrated one-vs-rest probabilities [N,P,K] of N pooled texts at the P probed layers.

    `p_{l,k} = sigmoid((w_{l,k} . pooled_l + b_{l,k}) / T_l)` with the regime's temperatures.
    """
    check_regime(artifacts, regime)
    if pooled_NLd.shape[1:] != (artifacts.weight.shape[0], artifacts.weight.shape[2]):
        raise ArtifactsError(
            f"the probes expect activations of {artifacts.weight.shape[0]} layers x "
            f"{artifacts.weight.shape[2]}, got {pooled_NLd.shape[1]} x {pooled_NLd.shape[2]}. "
            "Run 'spp probe' for this model."
        )
    temperature_L = artifacts.temperature[artifacts.regimes.index(regime)].astype(np.float64)
    logits = np.einsum("nld,lkd->nlk", pooled_NLd, artifacts.weight, dtype=np.float64)
    logits = (logits + artifacts.bias) / temperature_L[None, :, None]
    # Neither overflows for large |logit| nor rounds to 0, of which no mixture can be made.
    probabilities: FloatArray = np.exp(-np.logaddexp(0.0, -logits))
    return probabilities[:, list(artifacts.probe_layers)]


def diagnose_activations(
    pooled_NLd: FloatArray, tokens_N: IntArray, artifacts: Artifacts, regime: str | None = None
) -> Diagnosis:
    """Diagnosis of a scenario from its prompts' pooled residual stream, of so many tokens each.

    Without `regime` it is chosen: out-of-domain when the text is unfamiliar, or when the in-domain
    probabilities of the prompts' likeliest domains are, on average, below the artifacts' threshold;
    else cross-domain when two or more domains have at least their threshold's share of the mixture.
    The temperatures of cross-domain text are for prompts that mix domains: a prompt plainly of one
    domain, in a scenario of several, is still read at those of in-domain text.
    """
    probabilities_NPK = probe_probabilities(pooled_NLd, artifacts, regime or IN_DOMAIN)
    familiar = Familiar.of(artifacts)
    distance = familiar.distance(pooled_NLd, tokens_N) if familiar else None
    if regime is None:
        alone_NK = probabilities_NPK.mean(axis=1)
        regime = choose_regime(alone_NK, *artifacts.regime_rule)
        if distance is not None and distance >= 1:
            regime = OUT_OF_DOMAIN
        if regime != IN_DOMAIN and regime in artifacts.regimes:
            plain_N = np.array(
                [choose_regime(p_K[None], *artifacts.regime_rule) == IN_DOMAIN for p_K in alone_NK]
            ) & (regime == CROSS_DOMAIN)
            theirs_NPK = probe_probabilities(pooled_NLd, artifacts, regime)
            probabilities_NPK = np.where(plain_N[:, None, None], probabilities_NPK, theirs_NPK)
    layers = tuple(artifacts.probe_layers)
    probabilities = probabilities_NPK.mean(axis=0)
    return Diagnosis(artifacts.domains, probabilities, regime, len(pooled_NLd), layers, distance)


def choose_regime(probabilities_NK: FloatArray, known: float = KNOWN, share: float = SHARE) -> str:
    """Regime of N prompts from their mean probability over layers [N,K].

    `known`: the mean probability of the prompts' likeliest domains from which they are of one.
    `share`: the part of the mixture from which a domain counts.
    """
    # Per prompt: a scenario of pure chemistry and pure history prompts is half of each, and known.
    if probabilities_NK.max(axis=1).mean() < known:
        return OUT_OF_DOMAIN
    mean_K = probabilities_NK.mean(axis=0)
    return CROSS_DOMAIN if (mean_K >= share * mean_K.sum()).sum() > 1 else IN_DOMAIN


def diagnose_scenario(
    session: Session,
    artifacts: Artifacts,
    scenario: Scenario,
    regime: str | None = None,
    calibration_tokens: int = DEFAULT_CALIBRATION_TOKENS,
) -> Diagnosis:
    """Diagnosis of what a plan is made of, up to so many tokens of it: not of the prompts that are
    held out."""
    text = scenario_text(session, scenario, calibration_tokens).calibration
    diagnosis = diagnose_prompts(session, artifacts, text.texts, regime)
    held_out = len(scenario.split()[1])
    return replace(diagnosis, held_out=held_out, tokens=text.to_dict())


def diagnose_prompts(
    session: Session, artifacts: Artifacts, prompts: Sequence[Text], regime: str | None = None
) -> Diagnosis:
    """Forward the prompts once through the dense model and ask the probes.

    Raises ScenarioError where the tokenizer leaves nothing of them.
    """
    from spp_export.calibration.activations import TextMeans, observe, token_batches

    if not artifacts.familiar:
        _log.warning(
            "these artifacts cannot tell text of a domain that they do not know: they were "
            "imported or made by an older spp. 'spp probe' makes them anew."
        )
    shape = session.source.shape
    if regime is not None:
        check_regime(artifacts, regime)
    batches = token_batches(session.tokenizer, prompts)
    if not batches:
        raise ScenarioError("the scenario has no tokens for this model. Give it some text.")
    means = TextMeans("residual", len(prompts), shape.num_layers, shape.hidden_size)
    observe(
        session.reader,
        session.source.family,
        batches,
        [means],
        description="diagnosing the scenario",
    )
    seen = sorted({index for batch in batches for index in batch.texts})
    return diagnose_activations(means.values[seen], means.tokens[seen], artifacts, regime)

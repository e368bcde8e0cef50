"""The online algorithm of SubspacePath Pruner as it was released (ICML 2026).

Kept for comparison, oddities included. Two of them decide what its numbers mean:

* Its mask is not head removal. As released, it multiplies blocks of `d/H` coordinates of what
  attention adds to the residual stream, behind `o_proj`, where every head has already been mixed
  into every coordinate. A "dropped head" thus silences some outputs of all heads, and takes away
  neither the head's own contribution nor any weight, work or KV cache. Cutting the heads
  that it names is a different function.
* Its `strength` works against its name: more strength keeps more heads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spp_export.common.arrays import BoolArray, FloatArray
from spp_export.common.errors import ArtifactsError, ScenarioError, UsageError
from spp_export.data.scenario import Scenario

_WORDS = """
a an and are as at be been being but by can could did do does for from had has have he hello hi how
i in is it may might must no of ok okay on or please she should thank thanks that the these they
this those to was we were what when where which who why will with would yes you
"""
COMMON_WORDS = frozenset(_WORDS.split())
RHO_MIN = 0.1
SIMILARITY_FLOOR = 0.1
LOW_SIMILARITY = 0.3
SIGNIFICANT = 0.05
CROSS_DOMAIN = 0.15
POWER = 1.5
MIN_TOTAL = 0.05
MIN_PER_LAYER = 0.1
_TOP_LAYERS = 5
_EPS = 1e-8


@dataclass(frozen=True, eq=False)
class PublishedResult:
    """What the released algorithm keeps, and why.

    mask [L,H]            heads it keeps
    similarities [K]      s_k, the largest probability of a domain over layers
    inferred              domains that take part, by falling score; one in single-domain mode
    keep_ratio            share of all heads that each domain asked for; skipped domains are absent
    low                   no similarity reached 0.1, so domain-mean importance was used
    """

    mask: BoolArray
    similarities: FloatArray
    inferred: tuple[int, ...]
    breadth: float
    base_keep_ratio: float
    keep_ratio: Mapping[int, float]
    low: bool

    @property
    def ratio(self) -> float:
        """Share of heads it drops."""
        return 1.0 - int(self.mask.sum()) / self.mask.size


def published_text(scenario: Scenario) -> str:
    """The text it diagnoses: the description, else the first prompt, without common words.

    To be tokenised with the tokenizer's special tokens and cut at 512 tokens. Raises ScenarioError
    where no word is left.
    """
    first = scenario.conversations[0]
    text = remove_common_words(scenario.description or (*first.prompts, first.content)[0])
    if not text:
        raise ScenarioError(
            f"scenario {scenario.name}: the published policy drops common words, and no other word "
            "is in its description or first prompt."
        )
    return text


def remove_common_words(text: str) -> str:
    """The words of a text in lower case, without punctuation and the 64 common words."""
    words = re.findall(r"\w+", text.lower())
    return " ".join(word for word in words if word not in COMMON_WORDS)


def domain_scores(probabilities: FloatArray) -> FloatArray:
    """Score of each domain [K], from sigmoid outputs [L,K] of the layers with a probe.

    With each layer's outputs scaled to sum to one: `0.6 * mean of the 5 largest + 0.4 * largest`,
    times `1 + 0.3 / (m + 1)` for the m layers above 0.05. A layer of zeros stays as it is.
    """
    totals = probabilities.sum(axis=1, keepdims=True)
    # In the probes' own precision, as released; everything after is in double precision.
    shares = (probabilities / np.where(totals > 0, totals, 1)).astype(np.float64)
    descending = -np.sort(-shares, axis=0)
    base = 0.6 * descending[:_TOP_LAYERS].mean(axis=0) + 0.4 * descending[0]
    significant = (shares > SIGNIFICANT).sum(axis=0)
    scores: FloatArray = base * (1 + 0.3 * (1.0 / (significant + 1)))
    return scores


def infer_domains(probabilities: FloatArray) -> tuple[int, ...]:
    """The domains that take part, from sigmoid outputs [L,K]: all that score at least 0.15, by
    falling score, if there are two or more; else the best one. Of equal scores the lower index
    comes first."""
    scores = domain_scores(_probabilities(probabilities))
    # The released filter at 0.05 cannot remove a domain that the lines below would choose.
    high = [k for k in range(len(scores)) if scores[k] >= CROSS_DOMAIN]
    if len(high) > 1:
        return tuple(sorted(high, key=lambda k: scores[k], reverse=True))
    return (int(scores.argmax()),)


def session_breadth(probabilities: FloatArray) -> float:
    """`c = -sum qn log(qn + 1e-8) / log K` with `qn` the mean over layers of [L,K], normalised;
    0 where all are zero or K is 1."""
    mixture = probabilities.sum(axis=0, dtype=np.float64) / len(probabilities)
    total = mixture.sum()
    if total <= 0 or len(mixture) < 2:
        return 0.0
    mixture = mixture / total
    return float(-np.sum(mixture * np.log(mixture + _EPS)) / math.log(len(mixture)))


def published_mask(
    probabilities: FloatArray,
    importance: FloatArray,
    whitelist: Sequence[tuple[int, int]],
    strength: float,
    *,
    single_domain: bool = False,
    importance_only: bool = False,
) -> PublishedResult:
    """The heads that the released algorithm keeps.

    probabilities [P,K]   sigmoid outputs of the P layers that have a probe, no temperature
    importance [L,H,K]    score per head and domain
    whitelist             (layer, head) pairs that are always kept
    strength              eta, 0 or more: `beta = min(0.1 + eta * c, 1)`

    `single_domain` and `importance_only` are the released ablations: only the inferred domain of
    highest similarity, and ranking without the similarity. The latter changes nothing but ties by
    rounding: similarity is one factor for all heads of a domain, and the floors always use it.

    Of equal scores the earlier layer wins, then (in the floor on all heads only) the domain that
    was inferred first, then the lower head. Raises ArtifactsError for shapes, values or whitelist
    entries that do not fit, UsageError for a strength that is negative or not finite.
    """
    probabilities = _probabilities(probabilities)
    importance = _importance(importance, probabilities.shape[1])
    kept = _whitelist_mask(whitelist, importance.shape[:2])
    if not (math.isfinite(strength) and strength >= 0):
        raise UsageError(f"strength: expected a number of at least 0, got {strength}.")
    similarities = probabilities.max(axis=0).astype(np.float64)
    low = bool(similarities.max() < SIMILARITY_FLOOR)
    inferred = infer_domains(probabilities)
    if single_domain:
        inferred = (max(inferred, key=lambda k: similarities[k]),)
    breadth = session_breadth(probabilities)
    beta = min(RHO_MIN + strength * breadth, 1.0)

    used = [k for k in inferred if low or similarities[k] >= SIMILARITY_FLOOR]
    scores = _scores(importance, similarities, used, low)
    keep_ratio: dict[int, float] = {}
    for index, k in enumerate(used):
        keep_ratio[k] = min(beta * _effective_similarity(similarities, k, low), 1.0)
        ranking = _ranking(importance, k, low) if importance_only else scores[index]
        kept |= _top(ranking, max(1, int(ranking.size * keep_ratio[k])))
    _apply_floors(kept, scores)
    return PublishedResult(kept, similarities, inferred, breadth, beta, keep_ratio, low)


def _effective_similarity(similarities: FloatArray, k: int, low: bool) -> float:
    """Similarity warped twice, as released: once by the caller, once inside its selector."""
    similarity = float(similarities[k])
    if low:
        return max(similarity, LOW_SIMILARITY)
    valid = similarities[similarities >= SIMILARITY_FLOOR]
    least, most = float(valid.min()), float(valid.max())
    if most <= least:
        return similarity
    for _ in range(2):
        warped = ((similarity - least) / (most - least)) ** POWER
        similarity = least + warped * (most - least)
    return similarity


def _scores(
    importance: FloatArray, similarities: FloatArray, used: Sequence[int], low: bool
) -> FloatArray:
    """`e * I` [D,L,H] of the D used domains; similarity raw, not warped."""
    scores = np.empty((len(used), *importance.shape[:2]))
    for index, k in enumerate(used):
        similarity = max(similarities[k], LOW_SIMILARITY) if low else similarities[k]
        scores[index] = _ranking(importance, k, low)
        scores[index] *= similarity
    return scores


def _ranking(importance: FloatArray, k: int, low: bool) -> FloatArray:
    """Importance [L,H] that a domain ranks heads by: its own, or the mean where all are low."""
    ranking: FloatArray = importance.mean(axis=2) if low else importance[:, :, k]
    return ranking


def _top(scores: FloatArray, count: int) -> BoolArray:
    """Mask of the `count` largest, over all layers."""
    chosen = np.zeros(scores.size, dtype=np.bool_)
    chosen[_descending(scores)[:count]] = True
    return chosen.reshape(scores.shape)


def _descending(scores: FloatArray) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Flat indices by falling score; equal scores stay in order."""
    return np.argsort(-scores, axis=None, kind="stable")


def _apply_floors(kept: BoolArray, scores: FloatArray) -> None:
    """Add heads in place by their scores [D,L,H]: one per layer, 5 % of all, 10 % per layer."""
    layers, heads = kept.shape
    # Without a score, heads go in by index.
    best = scores.max(axis=0) if len(scores) else np.zeros((layers, heads))
    _fill_layers(kept, best, 1)
    missing = max(int(kept.size * MIN_TOTAL), layers) - int(kept.sum())
    if missing > 0:
        _fill_total(kept, scores, missing)
    _fill_layers(kept, best, max(int(heads * MIN_PER_LAYER), 1))


def _fill_layers(kept: BoolArray, best: FloatArray, least: int) -> None:
    for row, scores in zip(kept, best, strict=True):
        free = [head for head in _descending(scores) if not row[head]]
        row[free[: max(least - int(row.sum()), 0)]] = True


def _fill_total(kept: BoolArray, scores: FloatArray, missing: int) -> None:
    domains, _, heads = scores.shape
    for flat in _descending(scores.transpose(1, 0, 2)):
        layer, head = int(flat) // (domains * heads), int(flat) % heads
        if missing == 0:
            break
        if not kept[layer, head]:
            kept[layer, head] = True
            missing -= 1


def _probabilities(values: FloatArray) -> FloatArray:
    values = np.asarray(values)
    if values.ndim != 2 or 0 in values.shape:
        raise ArtifactsError(f"probabilities: expected [layers, domains], got {values.shape}.")
    if not ((values >= 0) & (values <= 1)).all():
        raise ArtifactsError("probabilities: expected values from 0 to 1.")
    return values


def _importance(values: FloatArray, domains: int) -> FloatArray:
    values = np.asarray(values)
    if values.ndim != 3 or 0 in values.shape or values.shape[2] != domains:
        raise ArtifactsError(
            f"importance: expected [layers, heads, {domains} domains], got {values.shape}."
        )
    if not np.isfinite(values).all():
        raise ArtifactsError("importance: holds a value that is not finite.")
    return values


def _whitelist_mask(whitelist: Sequence[tuple[int, int]], shape: tuple[int, ...]) -> BoolArray:
    mask = np.zeros(shape, dtype=np.bool_)
    for layer, head in whitelist:
        if not (0 <= layer < shape[0] and 0 <= head < shape[1]):
            raise ArtifactsError(
                f"whitelist: layer {layer}, head {head} does not exist; "
                f"there are {shape[0]} layers of {shape[1]} heads."
            )
        mask[layer, head] = True
    return mask

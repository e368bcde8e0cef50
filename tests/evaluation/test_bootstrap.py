"""Intervals against what they must be on synthetic documents."""

from __future__ import annotations

import math

import numpy as np
import pytest
from evaluating import document_scores
from scipy.stats import norm, t

from spp_export.evaluation import bootstrap
from spp_export.evaluation.bootstrap import (
    RESAMPLES,
    DocumentScores,
    agreement,
    mean_kl,
    paired_ratio,
    perplexity,
    perplexity_ratio,
    weighted_mean,
)


def scores(nll, dense, tokens):
    zeros = np.zeros(len(tokens))
    return DocumentScores(*(np.asarray(v, float) for v in (tokens, dense, nll, zeros, zeros)))


def test_interval_of_a_ratio_is_the_analytic_one():
    rng = np.random.default_rng(3)
    size, length = 400, 50.0
    lost = rng.normal(0.1, 0.2, size)
    tokens = np.full(size, length)
    dense = rng.normal(150, 20, size)
    found = perplexity_ratio(scores(dense + length * lost, dense, tokens))
    half = 1.96 * lost.std() / math.sqrt(size)
    assert found.value == pytest.approx(math.exp(lost.mean()))
    assert math.log(found.low) == pytest.approx(lost.mean() - half, abs=0.1 * half)
    assert math.log(found.high) == pytest.approx(lost.mean() + half, abs=0.1 * half)


def test_resamples_are_those_of_a_plain_loop():
    rng = np.random.default_rng(0)
    sums, counts = rng.random(12), rng.integers(1, 9, 12).astype(float)
    means = []
    drawn = np.random.default_rng(5).multinomial(12, np.full(12, 1 / 12), size=RESAMPLES)
    for times in drawn:
        chosen = [i for i, n in enumerate(times) for _ in range(n)]
        assert len(chosen) == 12
        means.append(sum(sums[i] for i in chosen) / sum(counts[i] for i in chosen))
    found = weighted_mean(sums, counts, seed=5)
    tail = norm.cdf(-math.sqrt(12 / 11) * t.ppf(0.975, 11))
    assert [found.low, found.high] == pytest.approx(list(np.quantile(means, (tail, 1 - tail))))


def test_pairing_cancels_what_documents_have_in_common():
    rng = np.random.default_rng(1)
    tokens, dense = np.full(60, 40.0), np.full(60, 100.0)
    common = rng.normal(20, 15, 60)
    ours = scores(dense + common, dense, tokens)
    theirs = scores(dense + common + 2 + rng.normal(0, 0.5, 60), dense, tokens)
    paired = paired_ratio(ours, theirs)
    assert paired.value == pytest.approx(math.exp(-2 / 40), rel=0.01)
    assert paired.high < 1
    assert paired.side(1) == -1
    alone = perplexity_ratio(ours), perplexity_ratio(theirs)
    assert alone[0].high > alone[1].low


def test_a_row_against_itself_is_one_exactly():
    ours = document_scores(0.1)
    found = paired_ratio(ours, ours)
    assert found.to_list() == [1, 1, 1]
    assert found.side(1) == 0


@pytest.mark.parametrize(
    ("documents", "plain", "least"),
    [(4, 0.82, 0.83), (9, 0.9, 0.9), (40, 0.95, 0.91)],
)
def test_few_documents_are_covered_about_as_claimed(documents, plain, least, monkeypatch):
    """Skewed as KL is, over answers of unequal lengths. Plain percentiles cover too little."""
    assert least < _covered(documents) <= 0.98
    monkeypatch.setattr(bootstrap, "_expanded", lambda documents: 0.025)
    assert _covered(documents) < plain


def _covered(documents):
    """How often the true mean is in the interval."""
    covered, seeds = 0, 600
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        tokens = np.minimum(96, rng.integers(30, 160, documents)).astype(float)
        kl = np.exp(rng.normal(math.log(0.1) - 0.08, 0.4, documents))
        found = weighted_mean(tokens * kl, tokens, seed)
        covered += found.low <= 0.1 <= found.high
    return covered / seeds


def test_documents_without_a_predicted_token_change_nothing():
    full = document_scores(0.1)
    added = DocumentScores(
        *(np.append(v, 0.0) for v in (full.tokens, full.dense_nll, full.nll, full.kl, full.agreed))
    )
    for figure in (perplexity_ratio, mean_kl, agreement):
        assert figure(added).to_list() == figure(full).to_list()


def test_one_document_has_no_interval_and_a_broken_model_no_figure():
    one = perplexity_ratio(scores([12.0], [10.0], [5.0]))
    assert one.value == pytest.approx(math.exp(0.4))
    assert math.isnan(one.low)
    assert one.side(1) == 0
    broken = scores([np.nan, 1.0], [1.0, 1.0], [5.0, 5.0])
    assert math.isnan(perplexity_ratio(broken).value)
    assert math.isinf(perplexity(scores([1e6, 1e6], [1.0, 1.0], [5.0, 5.0])))
    assert math.isnan(weighted_mean(np.zeros(0), np.zeros(0)).value)

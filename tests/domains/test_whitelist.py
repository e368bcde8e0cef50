"""The whitelist and its permuted control, against loops and known truths."""

from __future__ import annotations

import numpy as np
import pytest

from spp_export.domains.whitelist import (
    RATE,
    _p_values,
    _permuted,
    _statistic,
    choose_whitelist,
)


def backbone(domains=6, layers=4, heads=12):
    """Scores of no pattern but for a few heads that are high in every domain."""
    random = np.random.default_rng(0)
    importance = 1 + 0.01 * random.random((domains, layers, heads))
    importance[:, 0, 5] = 9.0  # high everywhere
    importance[:, 1, 2] = [9.0] * (domains - 1) + [1.0]  # high on average, and not in the last
    importance[:, 1, 7] = [1.0] * (domains - 1) + [9.0]  # high in one
    importance[:, 2] = 4.0  # a layer without preference
    importance[:, 3] *= 1000
    importance[:, 3, [0, 11]] *= np.linspace(2.9, 3.1, domains)[:, None]  # two, and larger writes
    return importance


def test_it_holds_heads_that_matter_alike_in_every_domain():
    found = choose_whitelist(backbone())
    assert found.heads == ((0, 5), (3, 0), (3, 11))
    report = found.to_dict()
    assert report["units"] == report["units_by_rule"] == 3
    assert report["units_confirmed"] >= 3
    assert report["expected_by_chance"] < 0.05
    assert report["empirical_false_discovery_rate"] == pytest.approx(found.expected / 3, abs=1e-6)
    assert "note" not in report


def test_it_is_a_function_of_scores_and_seed():
    assert choose_whitelist(backbone(), 3) == choose_whitelist(backbone(), 3)
    assert choose_whitelist(backbone(), 4).heads == choose_whitelist(backbone(), 3).heads


def test_nothing_stands_out():
    found = choose_whitelist(np.ones((6, 3, 4)))
    assert (found.heads, found.by_rule, found.confirmed) == ((), 0, 0)
    assert found.to_dict()["empirical_false_discovery_rate"] is None
    # of four heads none can stand 1.5 deviations above the mean with another as high
    importance = np.ones((6, 1, 4))
    importance[:, 0, :2] = 5.0
    assert choose_whitelist(importance).by_rule == 0


def test_two_domains_are_too_few_to_confirm_what_the_rule_finds():
    found = choose_whitelist(backbone(domains=2))
    assert found.by_rule > 0
    assert found.heads == ()
    assert (
        "heads of 2 domains agree by chance with a probability of 0.0069"
        in (found.to_dict()["note"])
    )


def test_chance_alone_is_confirmed_no_more_often_than_the_rate():
    """Independent scores, many models: a false discovery in about one of a hundred of them."""
    random = np.random.default_rng(1)
    hits = sum(
        choose_whitelist(random.random((6, 6, 9)), seed, permutations=1000).confirmed > 0
        for seed in range(30)
    )
    assert hits <= 30 * RATE + 3


def test_the_p_value_is_the_share_of_all_permutations_that_reach_the_head():
    """Three domains of four heads have 64 ways to stand together; count them all."""
    z = np.random.default_rng(5).standard_normal((3, 1, 4))
    z = (z - z.mean(axis=2, keepdims=True)) / z.std(axis=2, keepdims=True)
    exact = []
    for head in range(4):
        column = z[:, 0, head]
        observed = column.mean() - column.std()
        ways = [np.array([z[0, 0, a], z[1, 0, b], z[2, 0, c]]) for a, b, c in np.ndindex(4, 4, 4)]
        exact.append(np.mean([w.mean() - w.std() >= observed - 1e-9 for w in ways]))
    null, _ = _permuted(z[:, 0], 20_000, np.random.default_rng(0))
    found = _p_values(_statistic(z[:, 0])[0], null)
    np.testing.assert_allclose(found, exact, atol=0.01)

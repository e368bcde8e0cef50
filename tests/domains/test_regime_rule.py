"""The rule that chooses a regime, fitted on probabilities made up for each."""

from __future__ import annotations

import numpy as np

from spp_export.domains.diagnosis import CROSS_DOMAIN, IN_DOMAIN, OUT_OF_DOMAIN, choose_regime
from spp_export.domains.regimes import PROMPTS, fit_rule

JOINED = "cross-domain, joined prompts"
GROUPS = np.arange(48) % 3


def text(own=0.9, other=0.28, joined=(0.85, 0.8, 0.05), unknown=(0.6, 0.05, 0.05)):
    """Probabilities of the three regimes, with a little noise."""
    noise = np.random.default_rng(0).uniform(-0.02, 0.02, (3, 48, 3))
    pure = np.where(np.eye(3, dtype=bool)[GROUPS], own, 0.02)
    pure[np.arange(48), (GROUPS + 1) % 3] = other
    return {
        IN_DOMAIN: (pure + noise[0], GROUPS),
        CROSS_DOMAIN: (np.array(joined) + noise[1], np.arange(48) // PROMPTS),
        OUT_OF_DOMAIN: (np.array(unknown) + noise[2], GROUPS),
    }


def test_thresholds_are_learned_that_tell_the_regimes_apart():
    """The defaults would call in-domain text cross-domain, and know the unknown."""
    found = fit_rule(text())
    assert {kind: sum(row.values()) for kind, row in found.counts.items()} == {
        IN_DOMAIN: 12,
        CROSS_DOMAIN: 12,
        JOINED: 12,
        OUT_OF_DOMAIN: 12,
    }
    for kind, regime in ((IN_DOMAIN, IN_DOMAIN), (JOINED, CROSS_DOMAIN)):
        assert found.counts[kind][regime] == 12
    assert found.counts[OUT_OF_DOMAIN][OUT_OF_DOMAIN] == 12
    assert found.counts[CROSS_DOMAIN][CROSS_DOMAIN] >= 9
    assert choose_regime(text()[IN_DOMAIN][0][:1]) == CROSS_DOMAIN
    assert choose_regime(text()[OUT_OF_DOMAIN][0][:1]) == IN_DOMAIN


def test_counts_are_of_the_rule_itself_where_both_halves_agree():
    found = fit_rule(text())
    joined, groups = text()[CROSS_DOMAIN]
    for group in np.unique(groups):
        assert choose_regime(joined[groups == group], found.known, found.share) == CROSS_DOMAIN


def test_thresholds_without_text_that_speaks_for_them_keep_their_defaults():
    pure, groups = text()[IN_DOMAIN]
    alone = fit_rule({IN_DOMAIN: (pure, np.zeros(48, dtype=int))})
    assert (alone.known, alone.share) == (0.5, 0.15)
    assert set(alone.counts) == {IN_DOMAIN}
    joined = fit_rule({name: text()[name] for name in (IN_DOMAIN, CROSS_DOMAIN)})
    assert joined.known == 0.5
    assert joined.share > 0.2
    assert groups.max() == 2


def test_text_that_cannot_be_told_apart_is_counted_as_it_is():
    """Joined prompts that look like unknown ones: the counts say so."""
    found = fit_rule(text(joined=(0.6, 0.05, 0.05)))
    row = found.counts[JOINED]
    assert row[CROSS_DOMAIN] < 6
    assert sum(row.values()) == 12


def test_one_text_is_enough_to_run():
    counts = fit_rule({IN_DOMAIN: (np.array([[0.9, 0.1]]), np.zeros(1, dtype=int))}).counts
    assert counts == {IN_DOMAIN: {IN_DOMAIN: 1, CROSS_DOMAIN: 0, OUT_OF_DOMAIN: 0}}

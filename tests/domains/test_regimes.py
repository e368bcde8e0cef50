"""Joined texts and the calibration of three regimes."""

from __future__ import annotations

import numpy as np
import pytest

from spp_export.domains.diagnosis import CROSS_DOMAIN, IN_DOMAIN, OUT_OF_DOMAIN
from spp_export.domains.regimes import PROMPTS, RegimeText, calibrate, join_texts

HELD_OUT = (("a1", "a2", "a3"), ("b1", "b2"), ("c1",), ("d1", "d2"))


def test_joined_texts_are_of_two_or_three_domains_and_the_targets_say_which():
    joined = join_texts(HELD_OUT, 0)
    assert len(joined.texts) == len(joined.targets) == 64
    sizes = joined.targets.sum(axis=1)
    assert set(sizes) == {2, 3}
    for text, target in zip(joined.texts, joined.targets, strict=True):
        parts = text.split("\n\n")
        assert all(part in HELD_OUT["abcd".index(part[0])] for part in parts)
        assert sorted("abcd".index(part[0]) for part in parts) == list(np.flatnonzero(target))
    assert joined.targets.sum(axis=0).min() >= 16
    for run in joined.targets.reshape(-1, PROMPTS, 4):
        assert (run == run[0]).all()


def test_joined_texts_are_a_function_of_the_seed():
    assert join_texts(HELD_OUT, 1).texts == join_texts(HELD_OUT, 1).texts
    assert join_texts(HELD_OUT, 1).texts != join_texts(HELD_OUT, 2).texts


def test_joining_takes_two_domains():
    assert join_texts(HELD_OUT[:1], 0).texts == ()
    assert (join_texts(HELD_OUT[:2], 0).targets == 1).all()


def logits(targets, scale, seed):
    random = np.random.default_rng(seed)
    noise = random.standard_normal((len(targets), 2, targets.shape[1]))
    return scale * ((2 * targets - 1)[:, None, :] + noise)


def test_each_regime_has_its_own_temperatures_and_reliability():
    labels = np.arange(60) % 3
    targets = {
        IN_DOMAIN: np.eye(3)[labels],
        CROSS_DOMAIN: 1 - np.eye(3)[labels],
        OUT_OF_DOMAIN: np.zeros((60, 3)),
    }
    scales = {IN_DOMAIN: 1.0, CROSS_DOMAIN: 4.0, OUT_OF_DOMAIN: 10.0}
    text = {name: RegimeText(logits(t, scales[name], 0), t, labels) for name, t in targets.items()}
    found = calibrate(text)
    assert found.regimes == (IN_DOMAIN, CROSS_DOMAIN, OUT_OF_DOMAIN)
    assert found.temperature.shape == (3, 2)
    assert (found.temperature[1] > 2 * found.temperature[0]).all()
    report = found.manifest["reliability"]
    assert report[CROSS_DOMAIN]["ece_after"] < report[CROSS_DOMAIN]["ece_before"]
    assert report[IN_DOMAIN]["texts"] == 60
    assert set(found.manifest["regime_choice"]) >= {"known", "share", "counts"}


def test_a_regime_without_text_is_absent_and_says_why():
    targets = np.eye(3)[np.arange(12) % 3]
    some = RegimeText(logits(targets, 1.0, 1), targets, np.arange(12) % 3)
    nothing = RegimeText(np.zeros((0, 2, 3)), np.zeros((0, 3)), np.zeros(0, dtype=int))
    found = calibrate({IN_DOMAIN: some, OUT_OF_DOMAIN: nothing})
    assert found.regimes == (IN_DOMAIN,)
    assert found.temperature.shape == (1, 2)
    assert "left out" in found.manifest["reliability"][OUT_OF_DOMAIN]["absent"]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_handful_of_texts_is_enough_to_run(count):
    targets = np.eye(2)[np.arange(count) % 2]
    groups = np.arange(count) % 2
    found = calibrate({IN_DOMAIN: RegimeText(logits(targets, 1.0, 1), targets, groups)})
    assert np.isfinite(found.temperature).all()

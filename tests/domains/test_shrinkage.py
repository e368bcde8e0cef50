"""The shrinkage chosen on validation text, against explicit re-fits and constructed domains."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spp_export.domains.shrinkage import (
    SCENARIO_WEIGHTS,
    SHRINKAGES,
    GroupSeconds,
    LayerCase,
    choose_shrinkage,
    sampled_layers,
    strongest,
)

WIDTH, KEPT = 6, np.array([0, 1, 2, 3])


def moments(mixing, samples, seed):
    """Second moments of `samples` inputs whose last two are a function of the first four."""
    random = np.random.default_rng(seed)
    first = random.standard_normal((samples, 4))
    last = first @ mixing + 0.1 * random.standard_normal((samples, 2))
    inputs = np.column_stack([first, last])
    return inputs.T @ inputs / samples


def case(alike, train_samples=400, seed=0):
    """Domains that mix their inputs in the same way, or each in a way of its own."""
    random = np.random.default_rng(seed)
    shared = random.standard_normal((4, 2))
    ways = [shared if alike else random.standard_normal((4, 2)) for _ in range(3)]
    return LayerCase(
        weight=random.standard_normal((5, WIDTH)),
        train=np.stack([moments(w, train_samples, 10 + k) for k, w in enumerate(ways)]),
        own=np.stack([moments(w, 400, 20 + k) for k, w in enumerate(ways)]),
        judged=np.stack([moments(w, 400, 30 + k) for k, w in enumerate(ways)]),
        kept=KEPT,
    )


def test_domains_of_their_own_are_not_shrunk():
    found = choose_shrinkage(lambda layer: case(alike=False), [0])
    losses = found["shrinkage"]["loss"]
    assert found["shrinkage"]["chosen"] == 0
    assert list(losses) == [f"{s:g}" for s in SHRINKAGES]
    assert list(losses.values()) == sorted(losses.values())


def test_domains_alike_with_little_text_share_it():
    found = choose_shrinkage(lambda layer: case(alike=True, train_samples=6, seed=layer), range(4))
    assert found["shrinkage"]["chosen"] >= 0.75
    assert found["shrinkage"]["layers"] == [0, 1, 2, 3]


def explicit_loss(at, fitted, judged):
    """The share of energy lost after a ridge re-fit, from the normal equations."""
    gone = np.setdiff1d(np.arange(WIDTH), at.kept)
    among = fitted[np.ix_(at.kept, at.kept)]
    ridge = 0.01 * np.trace(among) / len(among)
    predicted = np.linalg.solve(among + ridge * np.eye(len(among)), fitted[np.ix_(at.kept, gone)])
    change = at.weight.copy()
    change[:, at.kept] = -at.weight[:, gone] @ predicted.T
    energy = np.trace(at.weight @ judged @ at.weight.T)
    return np.trace(change @ judged @ change.T) / energy


def test_the_losses_are_those_of_explicit_refits():
    at = case(alike=False)
    found = choose_shrinkage(lambda layer: at, [0])
    for s in SHRINKAGES:
        expected = np.mean(
            [
                explicit_loss(
                    at,
                    s * at.train.mean(0) + (1 - s) * at.train[k],
                    (at.own[k] + at.judged[k]) / 2,
                )
                for k in range(3)
            ]
        )
        assert found["shrinkage"]["loss"][f"{s:g}"] == pytest.approx(expected, abs=1e-7)
    s = found["shrinkage"]["chosen"]
    for w in SCENARIO_WEIGHTS:
        expected = np.mean(
            [
                explicit_loss(
                    at,
                    (1 - w) * (s * at.train.mean(0) + (1 - s) * at.train[k]) + w * at.own[k],
                    at.judged[k],
                )
                for k in range(3)
            ]
        )
        assert found["scenario_weight"]["loss"][f"{w:g}"] == pytest.approx(expected, abs=1e-7)
    chosen = found["scenario_weight"]
    assert chosen["loss"][f"{chosen['chosen']:g}"] == min(chosen["loss"].values())


def test_ties_follow_the_scenario_least():
    at = case(alike=True)
    same = LayerCase(at.weight, *(at.train[[0, 0, 0]],) * 3, at.kept)
    found = choose_shrinkage(lambda layer: same, [0])
    assert found["shrinkage"]["chosen"] == 1.0
    assert found["scenario_weight"]["chosen"] == 0.0


def test_layers_are_spread_and_fewer_where_they_are_wide():
    assert sampled_layers(range(30), 576) == (0, 4, 8, 12, 17, 21, 25, 29)
    assert sampled_layers(range(3), 64) == (0, 1, 2)
    assert sampled_layers(range(32), 4096) == (0, 31)
    assert sampled_layers((3, 7, 11), 64) == (3, 7, 11)


def test_the_kept_inputs_are_those_of_the_strongest_heads():
    energy = np.array([[[1.0, 9.0, 3.0, 4.0, 5.0]], [[1.0, 0.0, 3.0, 4.0, 5.0]]])
    np.testing.assert_array_equal(strongest(energy, 0, 2), [2, 3, 4, 5, 6, 7, 8, 9])
    assert len(strongest(np.ones((1, 1, 1)), 0, 3)) == 3


def test_second_moments_of_groups_in_one_pass():
    random = np.random.default_rng(0)
    seconds = GroupSeconds((1, 3), 4, [0, 1, 0])
    seen = {layer: [] for layer in (1, 3)}
    for _ in range(3):
        text = torch.tensor(random.integers(0, 3, 7))
        for layer in range(4):
            values = torch.tensor(random.standard_normal((7, 4)))
            seconds.see(layer, values, text)
            if layer in seen:
                seen[layer] += list(zip(values.numpy(), text.tolist(), strict=True))
    for layer, tokens in seen.items():
        for group, members in ((0, {0, 2}), (1, {1})):
            inputs = np.array([v for v, t in tokens if t in members])
            expected = inputs.T @ inputs / len(inputs)
            np.testing.assert_allclose(seconds.second(layer)[group], expected, rtol=1e-5)

"""Temperatures and calibration error against grids, loops and known truths."""

from __future__ import annotations

import numpy as np
import pytest
from pooled_classes import clusters, sigmoid

from spp_export.domains.probes import fit_probes
from spp_export.domains.regimes import calibration_error, fit_temperatures, reliability


@pytest.mark.parametrize("known", [0.4, 1.0, 3.0])
def test_a_known_temperature_is_recovered(known):
    """Labels drawn from sigmoid(z/T): of two domains, so that one-vs-rest is the true model."""
    random = np.random.default_rng(1)
    z = 2 * known * random.standard_normal((20_000, 1))
    labels = (random.random(20_000) < sigmoid(z[:, 0] / known)).astype(np.int64)
    logits = np.stack([-z, z], axis=2)
    assert fit_temperatures(logits, np.eye(logits.shape[2])[labels]) == pytest.approx(
        [known], rel=0.05
    )


def test_temperatures_have_the_lowest_loss_of_a_grid_layer_by_layer():
    pooled, labels = clusters(layers=3)
    weight, bias = fit_probes(pooled, labels, 3)
    held_out, truth = clusters(layers=3, spread=1.0, seed=0)
    logits = np.einsum("nld,lkd->nlk", held_out, weight) + bias
    found = fit_temperatures(logits, np.eye(3)[truth])
    assert found.shape == (3,)
    assert found.dtype == np.float32

    def loss(layer, temperature):
        z = logits[:, layer].astype(np.float64) / temperature
        wrong_way = np.where(np.arange(3) == truth[:, None], -z, z)
        return np.logaddexp(0, wrong_way).mean()

    for layer in range(3):
        grid = np.geomspace(0.05, 20, 400)
        best = min(loss(layer, temperature) for temperature in grid)
        assert loss(layer, found[layer]) <= best + 1e-9


@pytest.mark.parametrize(("sign", "end"), [(1, 0.05), (-1, 20.0)])
def test_temperatures_stay_within_their_bounds(sign, end):
    """Held-out text that is all right asks for a temperature of zero, all wrong for an infinite."""
    labels = np.arange(30) % 3
    logits = sign * (10.0 * np.eye(3)[labels] - 5)[:, None]
    assert fit_temperatures(logits, np.eye(logits.shape[2])[labels]) == pytest.approx(
        [end], rel=1e-3
    )


def test_targets_may_be_several_or_none():
    """Multi-hot text and text of no domain, against a fine grid."""
    random = np.random.default_rng(3)
    logits = 3 * random.standard_normal((40, 2, 4)) - 1
    targets = (random.random((40, 4)) < 0.4).astype(float)
    targets[:10] = 0
    found = fit_temperatures(logits, targets)
    for layer in range(2):
        losses = {}
        for temperature in np.geomspace(0.05, 20, 2000):
            z = logits[:, layer] / temperature
            losses[temperature] = (np.logaddexp(0, z) - targets * z).mean()
        assert found[layer] == pytest.approx(min(losses, key=losses.get), rel=0.01)


def slow_error(probabilities, outcomes):
    total = 0.0
    for low in range(10):
        inside = [
            n
            for n, p in enumerate(probabilities)
            if low / 10 <= p and (p < (low + 1) / 10 or low == 9)
        ]
        if inside:
            confidence = sum(probabilities[n] for n in inside) / len(inside)
            truth = sum(outcomes[n] for n in inside) / len(inside)
            total += len(inside) / len(probabilities) * abs(confidence - truth)
    return total


def test_calibration_error_is_the_mean_gap_over_ten_bins():
    random = np.random.default_rng(0)
    probabilities = np.concatenate([random.random(200), [0.0, 1.0]])
    outcomes = (random.random(202) < 0.5).astype(float)
    found = calibration_error(probabilities, outcomes)
    assert found == pytest.approx(slow_error(probabilities, outcomes), abs=1e-12)
    assert calibration_error(np.array([1.0, 0.0]), np.array([1.0, 0.0])) == 0
    assert calibration_error(np.array([0.9, 0.9]), np.array([0.0, 0.0])) == pytest.approx(0.9)


def test_reliability_improves_where_probes_are_too_sure():
    random = np.random.default_rng(2)
    truth = random.standard_normal((2000, 3, 2))
    targets = (random.random((2000, 2)) < sigmoid(truth[:, 0])).astype(float)
    report = reliability(4 * np.repeat(truth[:, :1], 3, axis=1), targets)
    assert report["texts"] == 2000
    assert report["ece_before"] > 0.15
    assert report["ece_after"] < 0.05


def test_reliability_judges_text_that_the_temperature_has_not_seen():
    """Fitted on itself one half would be perfect; each half asks for the other end of the scale."""
    logits = np.tile([[4.0, -4.0], [-4.0, 4.0]], (20, 1))[:, None, :]
    targets = np.tile([1.0, 0.0], (40, 1))
    report = reliability(logits, targets)
    assert report["ece_after"] > 0.4
    assert reliability(logits[:1], targets[:1]) == {"texts": 1}

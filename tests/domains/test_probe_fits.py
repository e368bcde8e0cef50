"""Probes against another solver, on constructed classes."""

from __future__ import annotations

import numpy as np
import pytest
from pooled_classes import clusters, sigmoid

from spp_export.domains.probes import fit_probes


def newton(features, targets, penalty, steps=50):
    """Weights and bias that minimise the mean logistic loss + penalty/2 ||w||^2."""
    x = np.column_stack([features, np.ones(len(features))])
    ridge = penalty * np.eye(x.shape[1])
    ridge[-1, -1] = 0
    parameters = np.zeros(x.shape[1])
    for _ in range(steps):
        p = sigmoid(x @ parameters)
        gradient = x.T @ (p - targets) / len(x) + ridge @ parameters
        hessian = (x * (p * (1 - p))[:, None]).T @ x / len(x) + ridge
        parameters -= np.linalg.solve(hessian, gradient)
    assert np.abs(gradient).max() < 1e-10
    return parameters[:-1], parameters[-1]


def test_probes_equal_those_of_another_solver():
    pooled, labels = clusters(per=12, layers=2, width=4)
    weight, bias = fit_probes(pooled, labels, 3)
    assert weight.shape == (2, 3, 4)
    assert bias.shape == (2, 3)
    assert weight.dtype == bias.dtype == np.float32
    for layer, k in np.ndindex(2, 3):
        features = pooled[:, layer].astype(np.float64)
        mean, deviation = features.mean(0), features.std(0, ddof=1)
        w, b = newton((features - mean) / deviation, labels == k, penalty=1e-2)
        np.testing.assert_allclose(weight[layer, k], w / deviation, rtol=1e-4, atol=1e-4)
        expected = b - (w / deviation) @ mean
        assert bias[layer, k] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_probes_tell_separate_classes_apart():
    pooled, labels = clusters(spread=0.15, per=40)
    weight, bias = fit_probes(pooled[::2], labels[::2], 3)
    logits = np.einsum("nld,lkd->nlk", pooled[1::2], weight) + bias
    assert (logits.argmax(axis=2) == labels[1::2, None]).all()
    own = np.take_along_axis(logits, labels[1::2, None, None], axis=2)
    assert (own > 0).mean() > 0.95


def test_a_feature_that_never_changes_has_no_weight():
    pooled, labels = clusters()
    pooled[:, :, 2] = 7.0
    weight, bias = fit_probes(pooled, labels, 3)
    assert (weight[:, :, 2] == 0).all()
    assert np.isfinite(weight).all()
    assert np.isfinite(bias).all()

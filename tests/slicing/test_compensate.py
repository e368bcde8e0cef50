from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from spp_export.calibration import refit as compensate
from spp_export.common.errors import ArtifactsError, UsageError

OUTPUTS, INPUTS, SAMPLES = 7, 12, 400
KEPT = np.array([0, 1, 2, 6, 7, 8, 11])
REMOVED = np.setdiff1d(np.arange(INPUTS), KEPT)


@pytest.fixture
def layer():
    """Weights, correlated inputs with a mean, and their second moments."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((OUTPUTS, INPUTS))
    mixing = random.standard_normal((INPUTS, INPUTS))
    inputs = random.standard_normal((SAMPLES, INPUTS)) @ mixing + random.standard_normal(INPUTS)
    return weight, inputs, inputs.T @ inputs / SAMPLES


def lost(weight, inputs, slim):
    """Mean squared error of the slim layer on the inputs themselves."""
    return np.mean(np.sum((inputs @ weight.T - inputs[:, KEPT] @ slim.T) ** 2, axis=1))


def lam(moments, ridge):
    return ridge * np.mean(np.diag(moments)[KEPT])


def test_without_ridge_it_is_least_squares_on_the_data(layer):
    weight, inputs, moments = layer
    expected, *_ = np.linalg.lstsq(inputs[:, KEPT], inputs @ weight.T, rcond=None)
    np.testing.assert_allclose(compensate.refit(weight, moments, KEPT, 0.0), expected.T, rtol=1e-9)


@pytest.mark.parametrize("ridge", [1e-3, 0.01, 1.0, 100.0])
def test_with_ridge_it_is_least_squares_with_rows_that_pull_to_the_slice(layer, ridge):
    weight, inputs, moments = layer
    pull = np.sqrt(SAMPLES * lam(moments, ridge)) * np.eye(len(KEPT))
    left = np.concatenate([inputs[:, KEPT], pull])
    right = np.concatenate([inputs @ weight.T, pull @ weight[:, KEPT].T])
    expected, *_ = np.linalg.lstsq(left, right, rcond=None)
    np.testing.assert_allclose(
        compensate.refit(weight, moments, KEPT, ridge), expected.T, rtol=1e-9
    )


def test_no_direction_improves_the_stated_objective(layer):
    weight, inputs, moments = layer
    slim = torch.tensor(compensate.refit(weight, moments, KEPT, 0.1), requires_grad=True)
    data, dense = torch.tensor(inputs), torch.tensor(weight)
    error = (data @ dense.T - data[:, KEPT] @ slim.T).square().sum(1).mean()
    pull = lam(moments, 0.1) * (slim - dense[:, KEPT]).square().sum()
    (gradient,) = torch.autograd.grad(error + pull, slim)
    assert gradient.abs().max() < 1e-10 * error.item()


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 0.01, 1.0, 1e6])
@pytest.mark.parametrize("seed", range(5))
def test_never_worse_than_the_plain_slice(ridge, seed):
    random = np.random.default_rng(seed)
    weight = random.standard_normal((OUTPUTS, INPUTS))
    inputs = random.standard_normal((SAMPLES, INPUTS)) @ random.standard_normal((INPUTS, INPUTS))
    moments = inputs.T @ inputs / SAMPLES
    slim = compensate.refit(weight, moments, KEPT, ridge)
    assert lost(weight, inputs, slim) <= lost(weight, inputs, weight[:, KEPT]) * (1 + 1e-12)


def test_a_large_ridge_gives_the_plain_slice(layer):
    weight, _, moments = layer
    np.testing.assert_allclose(compensate.refit(weight, moments, KEPT, 1e12), weight[:, KEPT])


def test_independent_inputs_leave_the_slice_as_it_is(layer):
    weight = layer[0]
    moments = np.diag(np.arange(1.0, INPUTS + 1))
    np.testing.assert_array_equal(compensate.refit(weight, moments, KEPT, 0.01), weight[:, KEPT])


def test_copies_of_kept_inputs_are_recovered_exactly(layer):
    weight, inputs, _ = layer
    inputs = inputs.copy()
    inputs[:, REMOVED] = inputs[:, KEPT[: len(REMOVED)]]
    moments = inputs.T @ inputs / SAMPLES
    slim = compensate.refit(weight, moments, KEPT, 0.0)
    assert lost(weight, inputs, slim) < 1e-18 * np.mean(np.sum((inputs @ weight.T) ** 2, axis=1))
    assert compensate.residual(weight, moments, KEPT, slim) < 1e-14


def test_nothing_removed_and_nothing_kept(layer):
    weight, _, moments = layer
    everything = np.arange(INPUTS)
    np.testing.assert_array_equal(compensate.refit(weight, moments, everything, 0.01), weight)
    assert compensate.refit(weight, moments, [], 0.01).shape == (OUTPUTS, 0)


def test_residual_is_measured_on_the_data(layer):
    weight, inputs, moments = layer
    energy = np.mean(np.sum((inputs @ weight.T) ** 2, axis=1))
    for slim in (weight[:, KEPT], compensate.refit(weight, moments, KEPT, 0.01)):
        expected = lost(weight, inputs, slim) / energy
        assert compensate.residual(weight, moments, KEPT, slim) == pytest.approx(expected)
    assert compensate.residual(weight, moments, np.arange(INPUTS), weight) == 0
    assert compensate.residual(weight, np.zeros_like(moments), KEPT, weight[:, KEPT]) == 0


def test_bias_makes_the_mean_output_exact(layer):
    weight, inputs, _ = layer
    added = compensate.bias(weight, inputs.mean(0), REMOVED)
    slim = inputs[:, KEPT] @ weight[:, KEPT].T + added
    np.testing.assert_allclose(slim.mean(0), (inputs @ weight.T).mean(0))


@pytest.mark.parametrize("ridge", [0.0, 0.01])
@pytest.mark.parametrize("dead", [KEPT[:2], KEPT, REMOVED, np.arange(INPUTS)])
def test_dead_inputs(layer, caplog, ridge, dead):
    weight, inputs, _ = layer
    inputs = inputs.copy()
    inputs[:, dead] = 0
    with caplog.at_level(logging.ERROR, logger="spp_export.calibration.refit"):
        slim = compensate.refit(weight, inputs.T @ inputs / SAMPLES, KEPT, ridge)
    assert np.isfinite(slim).all()
    assert lost(weight, inputs, slim) <= lost(weight, inputs, weight[:, KEPT]) * (1 + 1e-12)
    np.testing.assert_array_equal(
        slim[:, np.isin(KEPT, dead)], weight[:, np.intersect1d(KEPT, dead)]
    )


def test_more_inputs_than_samples_takes_the_smallest_change_and_says_so(layer, caplog):
    weight, inputs, _ = layer
    inputs = inputs[:4]
    slim = compensate.refit(weight, inputs.T @ inputs / 4, KEPT, 0.0)
    assert "singular" in caplog.text
    # The smallest change: least squares for what the removed inputs wrote, by the pseudo-inverse.
    written = inputs[:, REMOVED] @ weight[:, REMOVED].T
    expected, *_ = np.linalg.lstsq(inputs[:, KEPT], written, rcond=None)
    np.testing.assert_allclose(slim - weight[:, KEPT], expected.T, rtol=1e-5, atol=1e-7)
    assert lost(weight, inputs, slim) < 1e-9


def test_float32_in_large_layers_agrees_with_float64():
    random = np.random.default_rng(0)
    inputs, size, outputs = random.standard_normal((1500, 700)), 700, 30
    inputs = inputs @ random.standard_normal((700, 700))
    moments, weight = inputs.T @ inputs / 1500, random.standard_normal((outputs, size))
    kept = np.sort(random.permutation(size)[:600])
    gone = np.setdiff1d(np.arange(size), kept)
    slim = compensate.refit(weight.astype("f4"), moments.astype("f4"), kept, 0.01)
    among = moments[np.ix_(kept, kept)] + 0.01 * np.diag(moments)[kept].mean() * np.eye(600)
    expected = (
        weight[:, kept] + weight[:, gone] @ np.linalg.solve(among, moments[np.ix_(kept, gone)]).T
    )
    assert slim.dtype == np.float64
    np.testing.assert_allclose(slim, expected, atol=2e-4 * np.abs(expected).max())


MIRROR = np.eye(INPUTS)[::-1]
BAD_MOMENTS = {
    "not finite": lambda moments: moments + np.where(np.eye(INPUTS) > 0, np.nan, 0),
    "negative mean square": lambda moments: -moments,
    "of another layer": lambda moments: moments[1:, 1:],
    "no second moments": lambda moments: moments + 1e3 * (MIRROR + MIRROR.T),
}


@pytest.mark.parametrize("case", BAD_MOMENTS)
@pytest.mark.filterwarnings("error")
def test_bad_moments(layer, case):
    weight, _, moments = layer
    with pytest.raises(ArtifactsError) as caught:
        compensate.refit(weight, BAD_MOMENTS[case](moments), KEPT, 0.0)
    assert "\n" not in str(caught.value)


def test_bad_mean_and_bad_ridge(layer):
    weight, inputs, moments = layer
    with pytest.raises(ArtifactsError, match="12 finite numbers"):
        compensate.bias(weight, inputs.mean(0)[1:], REMOVED)
    with pytest.raises(ArtifactsError, match="12 finite numbers"):
        compensate.bias(weight, np.full(INPUTS, np.nan), REMOVED)
    for ridge in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError):
            compensate.refit(weight, moments, KEPT, ridge)

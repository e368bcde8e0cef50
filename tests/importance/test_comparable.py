"""What makes scores of different layers comparable, and what it must leave alone."""

from __future__ import annotations

import numpy as np
import pytest

from spp_export.importance.comparable import COMPARABLE, comparable

RANDOM = np.random.default_rng(3)
SENSITIVITY = RANDOM.gamma(2.0, size=6)
SCORES = RANDOM.gamma(2.0, size=(6, 9)) * np.geomspace(1, 1e4, 6)[:, None]


@pytest.mark.parametrize("how", COMPARABLE)
def test_order_inside_a_layer_stays(how):
    found = comparable(SCORES, how, sensitivity_L=SENSITIVITY)
    np.testing.assert_array_equal(found.argsort(axis=1), SCORES.argsort(axis=1))


@pytest.mark.parametrize("how", ["standardised", "share"])
def test_the_unit_of_a_layer_does_not_count(how):
    units = RANDOM.uniform(0.01, 100, size=(6, 1))
    np.testing.assert_allclose(comparable(SCORES * units, how), comparable(SCORES, how), rtol=1e-9)


def test_standardised_has_equal_spread_in_every_layer_and_zero_as_its_lowest():
    found = comparable(SCORES)
    np.testing.assert_allclose(found.std(axis=1), 1)
    means = found.mean(axis=1)
    np.testing.assert_allclose(means, means[0])
    assert found.min() == 0
    # the distance between two heads in deviations of their layer
    expected = (SCORES[2, 4] - SCORES[2, 7]) / np.std(SCORES[2])
    assert found[2, 4] - found[2, 7] == pytest.approx(expected)
    offsets = RANDOM.uniform(-5, 5, size=(6, 1))
    np.testing.assert_allclose(comparable(SCORES + offsets), found, rtol=1e-9, atol=1e-12)


def test_share_sums_to_one_in_every_layer():
    found = comparable(SCORES, "share")
    np.testing.assert_allclose(found.sum(axis=1), 1)
    assert found[3, 2] == pytest.approx(SCORES[3, 2] / sum(SCORES[3]))


def test_raw_changes_nothing():
    np.testing.assert_array_equal(comparable(SCORES, "raw"), SCORES)


def test_shifted_moves_all_layers_by_one_number():
    scores = SCORES - 3 * SCORES.mean()
    found = comparable(scores, "shifted")
    assert found.min() == 0
    np.testing.assert_allclose(found - scores, -scores.min())


def test_stream_is_the_mean_energy_of_writes_relative_to_the_stream():
    """Three tokens, two layers of two units; the stream's size and the writes are independent."""
    writes = np.array(
        [[[1.0, 2.0], [3.0, 4.0]], [[0.5, 0.1], [7.0, 2.0]], [[2.0, 2.0], [1.0, 0.0]]]
    )
    stream = np.array([[1.0, 10.0], [2.0, 20.0], [4.0, 50.0]])
    # every write with every size of the stream
    expected = np.zeros((2, 2))
    for write in writes:
        for size in stream:
            expected += write**2 / size[:, None] ** 2 / 9
    norms, sensitivity = np.sqrt((writes**2).mean(axis=0)), (1 / stream**2).mean(axis=0)
    found = comparable(norms, "stream", sensitivity_L=sensitivity)
    np.testing.assert_allclose(found, expected)


def test_stream_wants_sensitivities():
    with pytest.raises(AssertionError):
        comparable(SCORES, "stream")


@pytest.mark.parametrize("how", COMPARABLE)
@pytest.mark.parametrize("value", [0.0, 2.5])
def test_a_layer_whose_heads_are_alike_has_no_preference(how, value):
    scores = np.stack([np.full(9, value), SCORES[0]])
    found = comparable(scores, how, sensitivity_L=SENSITIVITY[:2])
    assert np.isfinite(found).all()
    assert len(set(found[0].tolist())) == 1


@pytest.mark.parametrize("how", COMPARABLE)
def test_any_numbers_come_out_in_double_precision_and_the_input_stays(how):
    scores = np.array([[1, 2, 4], [3, 3, 9]], dtype=np.float32)
    before = scores.copy()
    sensitivity = np.array([1, 2], dtype=np.float32)
    assert comparable(scores, how, sensitivity_L=sensitivity).dtype == np.float64
    np.testing.assert_array_equal(scores, before)

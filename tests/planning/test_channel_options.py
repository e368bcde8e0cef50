"""Widths of a layer and the channels that are best for each."""

from __future__ import annotations

import numpy as np
import pytest
from planning import model_shape

from spp_export.common.errors import PlanError
from spp_export.models.shape import channel_widths
from spp_export.planning.allocate.options import channel_options, per_parameter


@pytest.mark.parametrize(
    ("channels", "multiple", "widths"),
    [
        (192, 64, (64, 128, 192)),
        (200, 64, (64, 128, 192, 200)),
        (65, 64, (64, 65)),
        (64, 64, (64,)),
        (10, 64, (10,)),
        (3, 1, (1, 2, 3)),
    ],
)
def test_widths(channels, multiple, widths):
    assert channel_widths(channels, multiple) == widths


def test_every_width_keeps_the_highest_scores():
    rng = np.random.default_rng(0)
    for channels, multiple in [(10, 3), (12, 4), (7, 1), (5, 8)]:
        shape = model_shape(3, channels=channels)
        scores = rng.integers(-3, 4, (3, channels)) * rng.choice([1.0, 0.1])
        options = channel_options(scores, shape, multiple)
        before = np.zeros((3, channels), dtype=bool)
        for at, width in enumerate(options.widths):
            kept = options.kept([width] * 3)
            assert (kept >= before).all()
            before = kept
            for layer in range(3):
                best = sorted(range(channels), key=lambda c: (-scores[layer, c], c))[:width]
                assert np.flatnonzero(kept[layer]).tolist() == sorted(best)
                assert options.value[layer, at] == pytest.approx(scores[layer, best].sum())
    assert before.all()


def test_layers_of_different_widths():
    shape = model_shape(2, channels=4)
    options = channel_options([[1, 4, 2, 3], [0, 0, 0, 0]], shape, 1)
    kept = options.kept(np.array([2, 3]))
    assert [np.flatnonzero(row).tolist() for row in kept] == [[1, 3], [0, 1, 2]]


def test_the_worth_of_a_set_does_not_depend_on_the_order_of_its_channels():
    rng = np.random.default_rng(1)
    shape, scores = model_shape(1, channels=500), rng.normal(size=(1, 500))
    moved = rng.permutation(500)
    first = channel_options(scores, shape, 64).value
    assert (channel_options(scores[:, moved], shape, 64).value == first).all()


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (np.ones((2, 9)), r"scores have shape \[2, 9\] but the model needs \[2, 10\] .*channels"),
        (np.ones(10), r"scores have shape \[10\] but the model needs \[2, 10\]"),
        (np.full((2, 10), np.inf), "layer 0: the score of channel 0 is inf"),
        (np.array([[1.0] * 10, [1.0] * 9 + [np.nan]]), "layer 1: the score of channel 9 is nan"),
    ],
)
def test_scores_of_another_model_are_refused(scores, message):
    with pytest.raises(PlanError, match=message):
        channel_options(scores, model_shape(2, channels=10))


def test_scores_per_parameter():
    assert per_parameter([[1, -2]], 3.5).tolist() == [[3.5, -7.0]]

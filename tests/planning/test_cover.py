"""Regular layers around ragged masks against every regular layer there is."""

from __future__ import annotations

import numpy as np
import pytest
from planning import layer_cost, mask_of, model_shape, regular_masks

from spp_export.planning import cover


@pytest.mark.parametrize("kind", ["parameters", "kv-bytes"])
def test_no_smaller_regular_layer_contains_the_heads(kind):
    rng = np.random.default_rng(21)
    for sizes in [(3, 6, 3), (3, 6, 2), (3, 4, 4), (3, 5, 1)]:
        shape = model_shape(*sizes, bias=True)
        masks = regular_masks(shape)
        for _ in range(25):
            kept = rng.random((3, shape.query_heads)) < rng.choice([0.1, 0.4, 0.8])
            for layer, wanted in zip(cover(kept, shape), kept, strict=True):
                mask = mask_of(layer, shape)
                assert mask[wanted].all()
                around = [other for other in masks if other[wanted].all()]
                smallest = min(layer_cost(shape, other, kind) for other in around)
                assert layer_cost(shape, mask, kind) == smallest


def test_room_goes_to_the_lowest_index_or_the_highest_score():
    shape = model_shape(2, 6, 2)
    kept = np.array([[1, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0]], dtype=bool)
    assert [layer.query_heads for layer in cover(kept, shape)] == [(0, 2, 3, 4), (0,)]
    scores = np.arange(12.0).reshape(2, 6)
    assert [layer.query_heads for layer in cover(kept, shape, scores)] == [(0, 2, 4, 5), (5,)]

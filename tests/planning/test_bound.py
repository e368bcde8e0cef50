"""Bounds against sizes counted tensor by tensor."""

from __future__ import annotations

import math

import pytest
from planning import model_shape

from spp_export.models.families import FAMILIES
from spp_export.models.shape import LayerShape
from spp_export.planning.bound import decode_bound, predicted


def counted(shape, layers):
    """Elements of every tensor of the family's own list."""
    return sum(
        math.prod(tensor.shape) for tensor in FAMILIES[shape.model_type].tensors(shape, layers)
    )


@pytest.mark.parametrize("tied", [True, False])
def test_predicted_sizes(tied):
    shape = model_shape(2, 4, 2, bias=True, tied_embeddings=tied)
    layers = (LayerShape(2, 1, 10), LayerShape(2, 2, 7))
    result = predicted(shape, layers)
    assert result.parameters == counted(shape, layers)
    assert result.dense_parameters == counted(shape, shape.layers)
    assert result.file_bytes == 2 * result.parameters
    assert (result.kv_bytes, result.dense_kv_bytes) == (3 * 2 * 3 * 2, 4 * 2 * 3 * 2)
    assert [(case.batch, case.context) for case in result.decode] == [(1, 128), (16, 4096)]
    embedding = 0 if tied else shape.vocab_size * shape.hidden_size
    for case in result.decode:
        tokens = case.batch * case.context
        dense = 2 * (result.dense_parameters - embedding) + tokens * result.dense_kv_bytes
        slim = 2 * (result.parameters - embedding) + tokens * result.kv_bytes
        assert case.speedup == dense / slim
    assert result.to_dict()["decode_bound"][0]["batch"] == 1


def test_bound_limits():
    shape = model_shape(4, 4, 2)
    layers = (LayerShape(2, 1, 10),) * 4
    assert decode_bound(shape, shape.layers, 3, 50) == 1.0
    # At endless context only the KV cache counts: half the groups, twice the speed.
    assert decode_bound(shape, layers, 1, 10**12) == pytest.approx(2.0)
    short = shape.decode_parameters(shape.layers) / shape.decode_parameters(layers)
    assert decode_bound(shape, layers, 1, 0) == short

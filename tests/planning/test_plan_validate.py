"""A plan against the model it is to slice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from planning import mask_of, model_shape, regular_masks

from spp_export.common.errors import PlanError
from spp_export.planning import LayerPlan, Plan, dense_plan, validate_plan

SHAPE = model_shape(2, 6, 3)
DENSE = dense_plan(SHAPE, "f", "m").layers[0]


def plan_of(*layers, layout="per-layer"):
    return Plan("f", "m", layout, "none", layers)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            LayerPlan((0, 9), (0,)),
            r"layer 1: plan keeps KV group 9 but the model has 3 \(0-2\)\. R",
        ),
        (LayerPlan((0,), (0, 6)), r"plan keeps query head 6 but the model has 6 \(0-5\)"),
        (LayerPlan((0,), (0,), (10,)), r"plan keeps channel 10 but the model has 10 \(0-9\)"),
        (LayerPlan((0,), ()), r"plan keeps KV group 0 but none of its query heads \(0-1\)"),
        (LayerPlan((), (0,)), "plan keeps query head 0 but not its KV group 0"),
        (LayerPlan((0,), (1, 0)), "layer 1: the list of kept query heads holds 0 after 1"),
        (LayerPlan((0,), (-1, 0)), "layer 1: the list of kept query heads holds -1"),
        (LayerPlan((0,), (np.int64(0),)), "expected an integer"),
        (LayerPlan((0,), (0, 2)), "plan keeps query head 2 but not its KV group 1"),
        (LayerPlan((0, 2), (0, 1)), r"plan keeps KV group 2 but none of its query heads \(4-5\)"),
        (LayerPlan((0, 2), (0, 4, 5)), "keeps 1 query heads in KV group 0 but 2 in KV group 2"),
    ],
)
def test_layers_that_do_not_fit(layer, message):
    with pytest.raises(PlanError, match=message):
        validate_plan(plan_of(DENSE, layer), SHAPE, "f")


def test_accepts_exactly_the_regular_sets_of_heads():
    regular = {tuple(np.flatnonzero(mask).tolist()) for mask in regular_masks(SHAPE)}
    accepted = set()
    for bits in range(1, 2**6):
        heads = tuple(head for head in range(6) if bits >> head & 1)
        layer = LayerPlan(tuple(sorted({head // 2 for head in heads})), heads)
        try:
            validate_plan(plan_of(DENSE, layer), SHAPE, "f")
        except PlanError:
            continue
        accepted.add(heads)
        mask_of(layer, SHAPE)
    assert accepted == regular


def test_layer_count_fingerprint_and_uniform_layout():
    with pytest.raises(PlanError, match=r"plan has 1 layers but the model has 2\. Re-run"):
        validate_plan(plan_of(DENSE), SHAPE, "f")
    with pytest.raises(PlanError, match="plan is for the model with fingerprint f but this model"):
        validate_plan(plan_of(DENSE, DENSE), SHAPE, "g")
    small = LayerPlan((1,), (3,))
    validate_plan(plan_of(small, LayerPlan((2,), (4,)), layout="uniform"), SHAPE, "f")
    with pytest.raises(PlanError, match="layer 1: plan keeps 6 query heads, 3 KV heads and 10 ch"):
        validate_plan(plan_of(small, DENSE, layout="uniform"), SHAPE, "f")
    thin = replace(small, channels=(0, 3))
    with pytest.raises(PlanError, match=r"layer 1: .* 2 channels but the first keeps 1, 1 and 10"):
        validate_plan(plan_of(small, thin, layout="uniform"), SHAPE, "f")
    validate_plan(plan_of(small, thin), SHAPE, "f")

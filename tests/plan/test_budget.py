"""One budget, in one currency."""

from __future__ import annotations

import pytest
from planning import model_shape

from spp_export.budget import Budget
from spp_export.errors import UsageError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected exactly one of keep, max_params, max_kv_bytes, strength, got none"),
        ({"keep": 0.5, "max_params": 3}, "got keep and max_params"),
        ({"keep": 0}, r"keep must be a number in \(0, 1\], got 0"),
        ({"keep": 1.01}, "keep must be a number in .*got 1.01"),
        ({"keep": True}, "keep must be a number in .*got True"),
        ({"keep": float("nan")}, "keep must be a number in .*got nan"),
        ({"keep": "0.8"}, "keep must be a number in .*got '0.8'"),
        ({"max_params": 0}, "max_params must be a positive integer, got 0"),
        ({"max_params": 1e6}, "max_params must be a positive integer, got 1000000.0"),
        ({"max_kv_bytes": False}, "max_kv_bytes must be a positive integer, got False"),
        ({"strength": 1.5}, r"strength must be a number in \[0, 1\], got 1.5"),
        ({"strength": 0.5, "rho": -0.1}, r"rho must be a number in \[0, 1\], got -0.1"),
    ],
)
def test_malformed_budgets(options, message):
    with pytest.raises(UsageError, match=message):
        Budget(**options)


def test_limits():
    shape = model_shape(4, 4, 2)
    heads = shape.head_parameters(shape.layers)
    rest = shape.parameters(shape.layers) - heads
    assert Budget(keep=1).limit(shape).cost == heads
    assert Budget(max_params=rest + 5).limit(shape).cost == 5
    assert Budget(max_kv_bytes=77).limit(shape).kind == "kv-bytes"


@pytest.mark.parametrize(
    ("strength", "breadth", "rho", "keep"),
    [(0.0, 0.0, 0.1, 1.0), (1.0, 0.0, 0.1, 0.1), (1.0, 1.0, 0.1, 1.0), (0.5, 0.4, 0.2, 0.76)],
)
def test_strength(strength, breadth, rho, keep):
    budget = Budget(strength=strength, rho=rho)
    assert budget.adaptive_keep(breadth) == pytest.approx(keep)
    assert budget.as_json() == {"strength": strength, "rho": rho}


def test_strength_needs_a_breadth():
    with pytest.raises(UsageError, match="strength needs the breadth"):
        Budget(strength=0.5).limit(model_shape())
    with pytest.raises(UsageError, match="breadth must be a number"):
        Budget(strength=0.5).limit(model_shape(), 1.5)

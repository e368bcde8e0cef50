"""One budget, in one currency."""

from __future__ import annotations

import pytest
from planning import model_shape

from spp_export.common.errors import UsageError
from spp_export.planning.budget import Budget


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected exactly one of keep, max_params, .*max_latency, strength, got none"),
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
        (
            {"keep": 0.5, "units": "mlp"},
            "units must be one of heads, channels, both, experts, all, got 'mlp'",
        ),
        ({"max_kv_bytes": 9, "units": "both"}, "limits heads, and units are both; use units heads"),
        ({"max_kv_bytes": 9, "units": "channels"}, "max_kv_bytes limits heads, and units are ch"),
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


def test_limits_of_channels_and_of_both():
    shape = model_shape(4, 4, 2, bias=True)
    heads, channels = shape.head_parameters(shape.layers), 4 * 10 * 3 * 8
    whole = shape.parameters(shape.layers)
    for units, cost in (("channels", channels), ("both", heads + channels)):
        assert Budget(keep=1, units=units).limit(shape).cost == cost
        assert Budget(keep=0.25, units=units).limit(shape).cost == cost // 4
        assert Budget(max_params=whole - cost + 5, units=units).limit(shape).cost == 5
        limit = Budget(strength=0.5, units=units).limit(shape, 0.4)
        assert limit.cost == int(limit.keep * cost)
        assert limit.kind == "parameters"


def test_what_was_asked_names_the_units_where_they_are_not_heads():
    assert Budget(keep=0.5).to_dict() == {"keep": 0.5}
    assert Budget(keep=0.5, units="both").to_dict() == {"keep": 0.5, "units": "both"}


@pytest.mark.parametrize(
    ("strength", "breadth", "rho", "keep"),
    [(0.0, 0.0, 0.1, 1.0), (1.0, 0.0, 0.1, 0.1), (1.0, 1.0, 0.1, 1.0), (0.5, 0.4, 0.2, 0.76)],
)
def test_strength(strength, breadth, rho, keep):
    budget = Budget(strength=strength, rho=rho)
    assert budget.adaptive_keep(breadth) == pytest.approx(keep)
    assert budget.to_dict() == {"strength": strength, "rho": rho}


def test_strength_needs_a_breadth():
    with pytest.raises(UsageError, match="strength needs the breadth"):
        Budget(strength=0.5).limit(model_shape())
    with pytest.raises(UsageError, match="breadth must be a number"):
        Budget(strength=0.5).limit(model_shape(), 1.5)

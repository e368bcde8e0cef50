from __future__ import annotations

import pytest

from spp_campaigns.probe_pruning import kept_share, ratio_for
from spp_export.importance.probe_pruning.score import Targets
from spp_export.models.shape import LayerShape, ModelShape, Units, unit_parameters

SHAPE = ModelShape("llama", 32, 4096, 32, 8, 128, 14336, 128256, False, 2)

UNITS: tuple[Units, ...] = ("heads", "channels", "both")


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("keep", [0.9, 0.8, 0.7, 0.6, 0.5])
def test_the_ratio_comes_as_close_to_the_budget_as_whole_units_can(
    units: Units, keep: float
) -> None:
    share = kept_share(Targets.at(SHAPE, ratio_for(keep, SHAPE, units), 64), SHAPE, units)
    # One head of 29 pruned layers, K and V staying, is 2.3 % of q, k, v and o.
    assert abs(share - keep) <= 0.023 / 2 + 1e-9


@pytest.mark.parametrize("units", UNITS)
def test_the_share_is_that_of_layers_which_keep_k_and_v(units: Units) -> None:
    targets = Targets.at(SHAPE, 0.4, 64)
    heads = 32 if units == "channels" else targets.heads
    channels = 14336 if units == "heads" else targets.channels
    layers = [SHAPE.layer] * 3 + [LayerShape(heads, 8, channels)] * 29
    expected = unit_parameters(SHAPE, layers, units) / unit_parameters(SHAPE, SHAPE.layers, units)
    assert kept_share(targets, SHAPE, units) == pytest.approx(expected)


def test_nothing_goes_where_everything_may_stay() -> None:
    assert ratio_for(1.0, SHAPE, "both") == 0.0

"""Which units a layer keeps at every size it may have, and which size each layer gets.

`options` turns scores into the best units of every size and their worth. The sizes of all layers
are then a multiple-choice knapsack (`sizes`), with a class for the heads and another for the
channels of every layer, or one size for all layers.
"""

from __future__ import annotations

from spp_export.planning.allocate.options import (
    ChannelOptions,
    LayerOptions,
    Options,
    RaggedOptions,
    SetOptions,
    channel_options,
    layer_options,
    per_parameter,
    ragged_options,
    splittable_channels,
    splittable_heads,
)
from spp_export.planning.allocate.sizes import (
    Candidates,
    CostKind,
    UniformChoice,
    UniformSizes,
    allocate,
    choose_uniform,
    head_costs,
    smallest_cost,
    uniform_sizes,
    width_costs,
)

__all__ = [
    "Candidates",
    "ChannelOptions",
    "CostKind",
    "LayerOptions",
    "Options",
    "RaggedOptions",
    "SetOptions",
    "UniformChoice",
    "UniformSizes",
    "allocate",
    "channel_options",
    "choose_uniform",
    "head_costs",
    "layer_options",
    "per_parameter",
    "ragged_options",
    "smallest_cost",
    "splittable_channels",
    "splittable_heads",
    "uniform_sizes",
    "width_costs",
]

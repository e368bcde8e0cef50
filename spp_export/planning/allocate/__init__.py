"""Which units a layer keeps at every size it may have, and which size each layer gets.

`heads` and `channels` turn scores into options: the best units of every size, and their worth. The
sizes of all layers are then a multiple-choice knapsack (`sizes`), with a class for the heads and
another for the channels of every layer, or one size for all layers (`uniform`).
"""

from __future__ import annotations

from spp_export.planning.allocate.channels import ChannelOptions, channel_options
from spp_export.planning.allocate.heads import LayerOptions, Options, SetOptions, layer_options
from spp_export.planning.allocate.ragged import RaggedOptions, ragged_options
from spp_export.planning.allocate.scores import per_parameter
from spp_export.planning.allocate.sizes import (
    Candidates,
    CostKind,
    allocate,
    head_costs,
    smallest_cost,
    width_costs,
)
from spp_export.planning.allocate.tensor_parallel import splittable_channels, splittable_heads
from spp_export.planning.allocate.uniform import (
    UniformChoice,
    UniformSizes,
    choose_uniform,
    uniform_sizes,
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

"""Plans for shapes without weights: seeded scores through the real allocator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeVar

import numpy as np

from spp_bench.shapes.shapes import Published
from spp_export.common.errors import UsageError
from spp_export.models.shape import LayerShape, Units
from spp_export.planning import Layout, Plan, compile_units
from spp_export.planning.allocate.options import channel_options, layer_options, per_parameter
from spp_export.planning.budget import DEFAULT_KEEP, Budget
from spp_export.slicing.config import slim_config

LAYOUTS: tuple[Layout, ...] = ("per-layer", "uniform")
UNITS: tuple[Units, ...] = ("heads", "channels", "both")
Word = TypeVar("Word", bound=str)


@dataclass(frozen=True)
class Variant:
    """What is asked of a plan: the share of the units' parameters that stays, the layout and the
    units."""

    keep: float
    layout: Layout = "per-layer"
    units: Units = "heads"

    @property
    def name(self) -> str:
        """For rows and files, such as `per-layer-heads-0.7`."""
        return f"{self.layout}-{self.units}-{self.keep:g}"

    @property
    def budget(self) -> Budget:
        """The limit that follows; UsageError for a share out of range."""
        return Budget(keep=self.keep, units=self.units)


@dataclass(frozen=True)
class ShapePlan:
    """A compiled plan for a shape. `kept` is the share of the units' parameters that it really
    keeps."""

    variant: Variant
    plan: Plan
    kept: float
    config: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """For the results file."""
        variant = self.variant
        return {
            "layout": variant.layout,
            "units": variant.units,
            "keep": variant.keep,
            "kept": round(self.kept, 4),
        }

    def layers(self, of: Published) -> tuple[LayerShape, ...]:
        """What every layer has."""
        return self.plan.layer_shapes(of.shape)


def variants(
    keeps: Sequence[float] | None, layouts: Sequence[str] | None, units: Sequence[str] | None
) -> tuple[Variant, ...]:
    """Every combination once, in the order given, keep shares outermost; where nothing is given,
    the plan that `spp plan` makes by default.

    Raises UsageError for an unknown word, or a share out of range.
    """
    axes = (keeps or [DEFAULT_KEEP], layouts or LAYOUTS[:1], units or UNITS[:1])
    combinations = (
        Variant(keep, named("--layout", layout, LAYOUTS), named("--units", unit, UNITS))
        for keep, layout, unit in product(*axes)
    )
    return tuple(dict.fromkeys(combinations))


def named(option: str, word: str, known: Sequence[Word]) -> Word:
    """The member of `known` that a word names; UsageError if there is none."""
    for choice in known:
        if choice == word:
            return choice
    raise UsageError(f"{option} {word}: expected {' or '.join(known)}.")


def shape_plan(of: Published, variant: Variant, seed: int = 0) -> ShapePlan:
    """The plan that keeps the most of scores drawn at random.

    Raises BudgetError if the layout has no sizes that meet the share.
    """
    shape, random = of.shape, np.random.default_rng(seed)
    heads = random.gamma(2.0, size=(shape.num_layers, shape.query_heads))
    channels = random.gamma(2.0, size=(shape.num_layers, shape.channels))
    head = shape.query_head_parameters + shape.kv_head_parameters / shape.group_size
    layers, realised = compile_units(
        layer_options(per_parameter(heads, head), shape) if variant.units != "channels" else None,
        channel_options(per_parameter(channels, shape.channel_parameters), shape)
        if variant.units != "heads"
        else None,
        shape,
        variant.budget,
        variant.layout,
        of.family.stock_accepts(shape),
    )
    plan = Plan(of.fingerprint, of.name, variant.layout, "none", layers)
    shapes = plan.layer_shapes(shape)
    config = slim_config(of.config, of.family, shape, shapes, variant.layout)
    return ShapePlan(variant, plan, realised.keep, config)

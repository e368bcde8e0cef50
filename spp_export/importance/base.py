"""What a criterion is: two functions of one layer, and where they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Protocol

from spp_export.calibration.cache import LOSS
from spp_export.calibration.statistics import LayerStatistics
from spp_export.common.arrays import BoolArray, FloatArray, IndexArray
from spp_export.models.families import Family, Feature
from spp_export.models.shape import Kind, ModelShape, Units, includes

ScoredUnit = Literal["head", "channel", "expert", "expert channel"]


class Need(StrEnum):
    """What must be gathered before a criterion can score; weights are always available."""

    ACTIVATIONS = "activations"
    MOMENTS = "moments"
    GRADIENTS = "gradients"
    LOSS = "loss"
    AXIS = "axis"


class Convention(StrEnum):
    """Which of the coupled matrices a score reads."""

    OUTPUT_ONLY = "output-only"
    GROUP_SUM = "group-sum"
    NONE = "none"


@dataclass(frozen=True)
class Criterion:
    """Scores of the units of one layer, higher means keep: heads [H], channels [I] and, where it
    says something of them, experts [E] and the channels of each of them [E,F].

    source: the paper and the variant. comparable: how its scores are best put beside other
    layers', one of `COMPARABLE`. companion: the criterion whose scores its heads (or channels)
    are, for a method that is defined for one kind of unit only.
    """

    name: str
    source: str
    convention: Convention
    heads: Callable[[LayerStatistics], FloatArray]
    channels: Callable[[LayerStatistics], FloatArray]
    needs: frozenset[Need] = frozenset()
    comparable: str = "standardised"
    companion: str | None = None
    experts: Callable[[LayerStatistics], FloatArray] | None = None
    expert_channels: Callable[[LayerStatistics], FloatArray] | None = None


def check_convention(family: Family, criterion: Criterion | SetCriterion | None) -> None:
    """ModelError where a criterion sums over matrices that a family does not have."""
    if criterion is not None and criterion.convention is Convention.GROUP_SUM:
        what = f"criterion {criterion.name}"
        family.refuse((Feature.LATENT,), what, "Use one that reads o_proj alone, such as energy.")


def statistics_read(needs: Iterable[Need], units: Units, shape: ModelShape) -> tuple[str, ...]:
    """Kinds of statistics to gather for criteria with these needs, where these units of a model of
    this shape are scored."""
    needs, read = set(needs), unit_statistics(units, shape)
    kinds: list[str] = []
    if needs & {Need.ACTIVATIONS, Need.MOMENTS}:
        kinds += read
    if Need.LOSS in needs:
        kinds += [kind + LOSS for kind in read if kind in ("attention", "mlp")]
    if Need.GRADIENTS in needs:
        kinds.append("gradients")
    return tuple(kinds)


def unit_statistics(units: Units, shape: ModelShape) -> tuple[str, ...]:
    """Kinds of statistics of the projections that read these units, and of the stream after."""
    kinds: dict[ScoredUnit, str] = {
        "head": "attention",
        "channel": "mlp",
        "expert channel": "expert channels",
        "expert": "experts",
    }
    return tuple(kinds[unit] for unit in scored_units(units, shape))


def scored_units(units: Units, shape: ModelShape) -> tuple[ScoredUnit, ...]:
    """What has scores where these units of a model of this shape may go."""
    there: dict[ScoredUnit, tuple[Kind, bool]] = {
        "head": ("heads", True),
        "channel": ("channels", shape.has_mlps),
        "expert channel": ("channels", shape.expert_channels > 0),
        "expert": ("experts", True),
    }
    return tuple(unit for unit, (kind, has) in there.items() if has and includes(units, kind))


class HeadLosses(Protocol):
    """What a layer loses at every size of its attention, and the query heads kept at each.

    weight: o_proj [d,H*dh]; second [H*dh,H*dh]: E[a a^T] of its input; forced [G,g]: query heads
    that stay. Losses [G,N] are E||W a - W' a_S||^2, at [a-1,n-1] with a KV groups and n query heads
    in each, or in all where `ragged`; inf where forced heads do not fit. Heads kept [G,N,G,g].
    """

    def __call__(
        self, weight: FloatArray, second: FloatArray, forced: BoolArray, *, ragged: bool = False
    ) -> tuple[FloatArray, BoolArray]:
        """Losses and the heads kept."""


class ChannelLosses(Protocol):
    """What a layer loses at every width of its MLP, and which channels go first.

    weight: down_proj [d,I]; blocks [n,b,b]: diagonal blocks of E[z z^T] of its input; multiple: of
    which widths are, with `none` 0 among them. Losses [W] as of heads, at each of `channel_widths`;
    place [I] of the channels, best first: a width w keeps those of place below w.
    """

    def __call__(
        self, weight: FloatArray, blocks: FloatArray, multiple: int, *, none: bool = False
    ) -> tuple[FloatArray, IndexArray]:
        """Losses and the channels' places."""


@dataclass(frozen=True)
class SetCriterion:
    """A criterion that weighs sets of units, so that it gives losses of sizes and not scores.

    Its losses are energies of what a layer writes, which across layers go by `stream`; of moments
    by Need.LOSS they are in nats already, and go by `raw`. There is no other way. A loss is that of
    the mixture of all text, not a mixture of losses. experts: the criterion whose scores experts
    and their channels have, in the same units; None where there is none.

    attention: what a layer loses with all of its heads, from o_proj and the moments of its input.
    """

    name: str
    source: str
    convention: Convention
    heads: HeadLosses
    channels: ChannelLosses
    attention: Callable[[FloatArray, FloatArray], float]
    needs: frozenset[Need] = frozenset({Need.MOMENTS})
    comparable: str = "stream"
    experts: str | None = None

"""Text and criterion to the worth of every size of every layer: what allocation chooses from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from spp_export.calibration.mixture import WeightedTexts, gather_parts
from spp_export.calibration.moments import Moments
from spp_export.common.errors import UsageError
from spp_export.common.progress import progress
from spp_export.data.artifacts import Artifacts
from spp_export.importance import CRITERIA, LOSSES, FloatArray, comparable_kinds
from spp_export.importance.mixed import mixed_scores
from spp_export.importance.obs import removal_losses, single_removal_losses
from spp_export.importance.obs_channels import channel_removal
from spp_export.importance.probe_pruning.history import history_of
from spp_export.models.checkpoint.reader import read_float
from spp_export.models.session import Session
from spp_export.models.shape import Units, channel_widths
from spp_export.planning.allocate import (
    BoolArray,
    ChannelOptions,
    GivenOptions,
    Options,
    channel_options,
    layer_options,
    per_parameter,
    ragged_options,
)

OBS = "obs"
# Their scores come from a pass over the scenario through layers already pruned.
SEQUENTIAL = {"pp-scenario": False, "full-batch-probing-scenario": True}
CRITERION_NAMES = (*CRITERIA, OBS, *SEQUENTIAL)
# `obs` assumes that what stays is re-fitted; without that, energy is the better guide.
DEFAULT_CRITERION = {"lstsq": OBS, "bias": "energy", "none": "energy"}


def option_kinds(units: Units) -> tuple[str, ...]:
    """Kinds of statistics whose moments speak of these units."""
    return tuple(kind for kind, of in (("attention", "channels"), ("mlp", "heads")) if units != of)


@dataclass(frozen=True)
class UnitOptions:
    """Worth of every size of every layer's heads and channels; None where all of them stay."""

    heads: Options | None
    channels: ChannelOptions | None


@dataclass(frozen=True)
class Scoring:
    """How units are scored for the text of `parts`.

    comparable: one of `COMPARABLE`, or None for the criterion's own. forced: heads that stay.
    removed: the share that sequential criteria prune on their way. multiple: of channel widths.
    ragged: whether single heads may go.
    """

    session: Session
    artifacts: Artifacts
    parts: tuple[WeightedTexts, ...]
    criterion: str
    units: Units
    forced: BoolArray
    comparable: str | None = None
    removed: float = 0.2
    multiple: int = 64
    seed: int = 0
    ragged: bool = False

    def options(self) -> UnitOptions:
        """What the allocator chooses from."""
        if self.criterion == OBS:
            return self._removal_options()
        heads, channels = self.scores()
        shape = self.session.source.shape
        parameters = (
            shape.query_head_parameters + shape.kv_head_parameters / shape.group_size,
            float(shape.channel_parameters),
        )
        worth_heads, worth_channels = self._worth((heads, channels), parameters)
        head_options = ragged_options if self.ragged else layer_options
        return UnitOptions(
            None if worth_heads is None else head_options(worth_heads, shape, self.forced),
            None
            if worth_channels is None
            else channel_options(worth_channels, shape, self.multiple),
        )

    def _worth(
        self, kinds: Sequence[FloatArray | None], parameters: Sequence[float]
    ) -> list[FloatArray | None]:
        """Worth of units [L,U]: a loss is one by itself, other scores weigh a unit's parameters."""
        given = [kind for kind in kinds if kind is not None]
        how = self.how_comparable
        found = iter(
            comparable_kinds(given, how, self._sensitivities() if how == "stream" else None)
        )
        return [
            None
            if kind is None
            else next(found)
            if how in LOSSES
            else per_parameter(next(found), each)
            for kind, each in zip(kinds, parameters, strict=True)
        ]

    @property
    def how_comparable(self) -> str:
        """The name in `COMPARABLE` that applies."""
        if self.comparable is not None:
            return self.comparable
        return CRITERIA[self.criterion].comparable if self.criterion in CRITERIA else "standardised"

    def scores(self) -> tuple[FloatArray | None, FloatArray | None]:
        """Scores [L,H] of heads and [L,I] of channels, None for units that all stay."""
        if self.criterion in SEQUENTIAL:
            return self._sequential()
        mixed = partial(
            mixed_scores,
            self.session,
            self.artifacts,
            self.parts,
            CRITERIA[self.criterion],
            seed=self.seed,
        )
        return (
            mixed("head") if self.units != "channels" else None,
            mixed("channel") if self.units != "heads" else None,
        )

    def record(self) -> dict[str, Any]:
        """What decided, for plan.json."""
        record: dict[str, Any] = {"name": self.criterion}
        if self.criterion != OBS:
            record["comparable"] = self.how_comparable
        if self.criterion == "random":
            record["seed"] = self.seed
        return record

    def _sequential(self) -> tuple[FloatArray | None, FloatArray | None]:
        """Probe Pruning's static builds: the scenario's own prompts as the batch to come."""
        from spp_export.calibration.activations import token_batches
        from spp_export.importance.probe_pruning import scenario_scores

        own = [part for part in self.parts if part.domain is None]
        if not own:
            raise UsageError(f"--criterion {self.criterion}: it reads the scenario's own text.")
        if self.session.from_disk:
            raise UsageError(
                f"--criterion {self.criterion}: needs every weight in memory, and this model runs "
                "layer by layer. Choose another criterion, or --no-layerwise."
            )
        session, full = self.session, SEQUENTIAL[self.criterion]
        family, shape = session.source.family, session.source.shape
        history = None
        if not full:
            pools = [text for part in self.parts if part.domain for text in part.texts]
            history = history_of(session, pools)
        heads, channels = scenario_scores(
            session.model,
            family,
            shape,
            token_batches(session.tokenizer, own[0].texts),
            ratio=self.removed,
            history=history,
            full=full,
            units=self.units,
            multiple=self.multiple,
        )
        return (
            heads if self.units != "channels" else None,
            channels if self.units != "heads" else None,
        )

    def _sensitivities(self) -> list[FloatArray]:
        """Of the stream where each kind of unit writes, for the units that may go."""
        moments = gather_parts(self.session, self.parts, option_kinds(self.units))
        found = []
        if self.units != "channels":
            found.append(moments.sensitivity())
        if self.units != "heads":
            found.append(moments.channel_sensitivity())
        return found

    def _removal_options(self) -> UnitOptions:
        """`obs`: minus the loss of every size, in units of the residual stream."""
        heads = channels = None
        moments = gather_parts(self.session, self.parts, option_kinds(self.units))
        if self.units != "channels":
            heads = self._head_removal(moments)
        if self.units != "heads":
            channels = self._channel_removal(moments)
        return UnitOptions(heads, channels)

    def _head_removal(self, moments: Moments) -> Options:
        shape, family = self.session.source.shape, self.session.source.family
        groups = (shape.kv_heads, shape.group_size)
        sizes = (shape.kv_heads, shape.query_heads) if self.ragged else groups
        value = np.zeros((shape.num_layers, *sizes))
        sets = np.zeros((*value.shape, *groups), dtype=bool)
        removal = single_removal_losses if self.ragged else removal_losses
        sensitivity = moments.sensitivity()
        with progress("weighing heads", shape.num_layers) as advance_to:
            for layer in range(shape.num_layers):
                losses, sets[layer] = removal(
                    self._weight(layer, family.output),
                    moments.second(layer),
                    self.forced[layer].reshape(groups),
                )
                value[layer] = -losses * sensitivity[layer]
                advance_to(layer + 1)
        return GivenOptions(value, sets, self.ragged)

    def _channel_removal(self, moments: Moments) -> ChannelOptions:
        shape, family = self.session.source.shape, self.session.source.family
        values, ranks = [], []
        sensitivity = moments.channel_sensitivity()
        with progress("weighing channels", shape.num_layers) as advance_to:
            for layer in range(shape.num_layers):
                losses, rank = channel_removal(
                    self._weight(layer, family.down), moments.channel_blocks(layer), self.multiple
                )
                values.append(-losses * sensitivity[layer])
                ranks.append(rank)
                advance_to(layer + 1)
        widths = channel_widths(shape.channels, self.multiple)
        return ChannelOptions(widths, np.stack(values), np.stack(ranks))

    def _weight(self, layer: int, role: str) -> FloatArray:
        source = self.session.source
        return read_float(source.tensors[f"{source.family.layer_name(layer, role)}.weight"])

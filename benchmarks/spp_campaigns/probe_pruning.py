"""Probe Pruning as published: every batch decides its own masks on the dense model (mode sync).

Nothing is sliced: the inputs of o_proj and down_proj are zeroed for the units a batch drops, which
computes the same function. No parameter is saved, and of attention only query heads are dropped: K
and V stay whole. It is here for comparison, at the budget that `achieved_keep` gives; importing
this module registers it for `spp eval`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spp_export.common.errors import UsageError
from spp_export.evaluation.harness.rows import BASELINES, Row
from spp_export.evaluation.harness.runner import OpenedRow
from spp_export.importance.probe_pruning.blocks import (
    AttentionBlock,
    ProbedBlock,
    layer_blocks,
    zero_removed,
)
from spp_export.importance.probe_pruning.history import History, history_of
from spp_export.importance.probe_pruning.probe import PositionMoments, choose, whole
from spp_export.importance.probe_pruning.score import Targets, fuse, ppsp
from spp_export.models.families import Family
from spp_export.models.session import Session
from spp_export.models.shape import ModelShape, Units, unit_parameters

_MOMENTUM = 0.99


@dataclass(frozen=True)
class Decision:
    """What one batch decided for one block: scores and the mask of kept units, [H] or [I]."""

    scores: Tensor
    kept: Tensor


class DynamicPruning:
    """What the masks have done so far.

    `heads` and `channels` hold the last batch's decisions by layer; layers that are never pruned
    have none. `batches` counts decided batches.
    """

    def __init__(self, layers: int, units: Units) -> None:
        self.heads: dict[int, Decision] = {}
        self.channels: dict[int, Decision] = {}
        self.batches = 0
        self._units = units
        self._removed = {kind: [0.0] * layers for kind in ("heads", "channels")}

    @property
    def removed_heads(self) -> tuple[float, ...]:
        """Share of query heads removed in each layer, the mean over batches."""
        return tuple(total / max(self.batches, 1) for total in self._removed["heads"])

    @property
    def removed_channels(self) -> tuple[float, ...]:
        """Share of channels removed in each layer, the mean over batches."""
        return tuple(total / max(self.batches, 1) for total in self._removed["channels"])

    def achieved_keep(self, shape: ModelShape) -> float:
        """Share of the parameters of `units` that would be left in a model with these masks.

        For heads these are q, k, v and o, of which k and v stay whole; for channels gate, up and
        down.
        """
        kept = total = 0.0
        if self._units != "channels":
            kept += shape.query_heads * shape.query_head_parameters * _left(self.removed_heads)
            kept += shape.num_layers * shape.kv_heads * shape.kv_head_parameters
            total += shape.head_parameters(shape.layers)
        if self._units != "heads":
            kept += shape.channels * shape.channel_parameters * _left(self.removed_channels)
            total += shape.num_layers * shape.channels * shape.channel_parameters
        return kept / total

    def record(self, block: ProbedBlock, decision: Decision) -> None:
        """Take one block's decision on the batch now running."""
        attention = isinstance(block, AttentionBlock)
        (self.heads if attention else self.channels)[block.layer] = decision
        share = 1 - float(decision.kept.float().mean())
        self._removed["heads" if attention else "channels"][block.layer] += share


def _left(removed_L: tuple[float, ...]) -> float:
    return sum(1 - share for share in removed_L)


@contextmanager
def probe_pruning(
    model: nn.Module,
    family: Family,
    shape: ModelShape,
    *,
    ratio: float,
    history: History | None,
    units: Units,
    full_batch: bool = False,
    multiple: int = 64,
) -> Iterator[DynamicPruning]:
    """The dense `model` under masks that each batch decides anew; undone on exit.

    Each block of each batch is probed on the prefix as this batch has pruned it, fused with a copy
    of `history` that follows the text: kept columns take a hundredth of each batch but the first.
    `full_batch`: the whole batch is the probe and there is no history.

    Counts per layer are the published ones for `ratio` (`Targets`). A forward pass on a filled
    cache belongs to the batch that filled it and keeps its masks.

    Raises UsageError without a history (unless `full_batch`), for a ratio the layers cannot give,
    and for an attention mask that is not [B,S] with padding on the right.
    """
    if history is None and not full_batch:
        raise UsageError("probe pruning got no history; gather one, or probe the full batch.")
    session = _Session(
        DynamicPruning(shape.num_layers, units),
        Targets.at(shape, ratio, multiple),
        None if full_batch else history,
    )
    decoder = model.get_submodule(family.layers.rpartition(".")[0])
    with ExitStack() as hooks:
        handle = decoder.register_forward_pre_hook(session.begin, with_kwargs=True)
        hooks.callback(handle.remove)
        for attention, mlp in layer_blocks(model, family, shape)[session.targets.skipped :]:
            for block, pruned in ((attention, units != "channels"), (mlp, units != "heads")):
                if pruned:
                    _hook(hooks, block, session)
        yield session.result


class _Session:
    """The batch now running, and what is carried from one batch to the next."""

    def __init__(self, result: DynamicPruning, targets: Targets, history: History | None) -> None:
        self.result = result
        self.targets = targets
        self.history = history
        self.fresh = True
        self._mask: Tensor | None = None

    def begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the decoder: is this a new batch, and where is its padding?"""
        cache = kwargs.get("past_key_values")
        self.fresh = cache is None or cache.get_seq_length() == 0
        self._mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if self._mask is not None and self._mask.dim() != 2:
            raise UsageError(
                f"probe pruning needs an attention mask [batch, tokens], got "
                f"{list(self._mask.shape)}; pass the tokenizer's."
            )
        if self.fresh:
            if self._mask is not None and bool((self._mask[:, 1:] > self._mask[:, :-1]).any()):
                raise UsageError(
                    "probe pruning needs padding on the right, got padding on the left; set the "
                    "tokenizer's padding_side, or pass one text at a time."
                )
            self.result.batches += 1

    def real(self, values: Tensor) -> Tensor:
        """Which tokens of `values` [B,S,...] are not padding, on the device of `values`."""
        if self._mask is None:
            return torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
        return self._mask.bool().to(values.device)


def _hook(hooks: ExitStack, block: ProbedBlock, session: _Session) -> None:
    pruner = _BlockPruner(block, session)
    reads_all = session.history is None
    if not reads_all:
        hooks.callback(block.norm.register_forward_pre_hook(pruner.residual).remove)
        handle = block.body.register_forward_pre_hook(pruner.probe, with_kwargs=True)
        hooks.callback(handle.remove)
    apply: Callable[..., tuple[Any, ...]] = pruner.probe_whole if reads_all else pruner.apply
    hooks.callback(block.consumer.register_forward_pre_hook(apply).remove)


class _BlockPruner:
    """The hooks of one block."""

    def __init__(self, block: ProbedBlock, session: _Session) -> None:
        self._block = block
        self._session = session
        self._residual: Tensor | None = None
        self._kept = torch.empty(0)
        history = session.history
        self._history = None if history is None else history.of(block).clone()

    def residual(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before the norm: the values that tokens are ranked by."""
        self._residual = args[0] if self._session.fresh else None

    @torch.no_grad()
    def probe(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the block: choose tokens, run them ahead, decide."""
        if self._residual is None:
            return
        assert self._history is not None
        real = self._session.real(self._residual)
        probe = choose(self._residual, real, longest=len(self._history))
        self._residual = None
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        moments = PositionMoments(real.shape[1])
        moments.add(self._block.ahead(x, probe, kwargs), probe)
        self._history = self._history.to(x.device)
        fused = fuse(moments.values[probe.positions], self._history[probe.positions])
        self._decide(fused)

    @torch.no_grad()
    def apply(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before the consumer: zero what was dropped, and let the history follow what was kept."""
        if self._session.fresh and self._session.result.batches > 1:
            self._follow(args[0])
        return self._masked(args)

    def probe_whole(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before the consumer: since only inputs are masked, its input is already the whole batch
        run ahead.

        Decides on it and zeroes what is dropped.
        """
        if self._session.fresh:
            with torch.no_grad():
                self._decide(self._moments(args[0], args[0].shape[1]).values)
        return self._masked(args)

    def _decide(self, moments: Tensor) -> None:
        scores = ppsp(moments.sum(0), self._block.consumer.weight, self._block.units)
        kept = self._session.targets.keep(self._block, scores)
        self._kept = self._block.columns(kept)
        self._session.result.record(self._block, Decision(scores, kept))

    def _masked(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not len(self._kept):
            raise UsageError(
                "probe pruning met a filled cache before any text; start the text in its context."
            )
        return zero_removed(args[0], self._kept), *args[1:]

    def _moments(self, values: Tensor, positions: int) -> PositionMoments:
        """Moments of the whole batch [B,S,C] at its first positions."""
        first = values[:, :positions]
        moments = PositionMoments(first.shape[1])
        moments.add(first, whole(self._session.real(values)[:, :positions]))
        return moments

    def _follow(self, values: Tensor) -> None:
        """Update the moving average of the history: kept columns, at the positions that this batch
        has."""
        assert self._history is not None
        moments = self._moments(values, len(self._history))
        seen = moments.counts > 0
        history = self._history[: len(seen)]
        moved = _MOMENTUM * history + (1 - _MOMENTUM) * moments.values.to(history)
        changed = seen[:, None] & self._kept
        self._history[: len(seen)] = torch.where(changed, moved, history)


def kept_share(targets: Targets, shape: ModelShape, units: Units) -> float:
    """Share of the parameters of `units` that these counts leave; K and V stay whole."""
    pruned = shape.num_layers - targets.skipped
    gone = 0
    if units != "channels":
        gone += pruned * (shape.query_heads - targets.heads) * shape.query_head_parameters
    if units != "heads":
        gone += pruned * (shape.channels - targets.channels) * shape.channel_parameters
    return 1 - gone / unit_parameters(shape, shape.layers, units)


def ratio_for(keep: float, shape: ModelShape, units: Units, multiple: int = 64) -> float:
    """The pruning ratio, in hundredths, whose counts come closest to leaving `keep` of the units'
    parameters. The published ratio counts units, including those of whole layers, and not
    parameters."""
    distances = {}
    for hundredths in range(100):
        try:
            targets = Targets.at(shape, hundredths / 100, multiple)
        except UsageError:  # the other layers cannot make up for the protected ones
            break
        distances[hundredths / 100] = abs(kept_share(targets, shape, units) - keep)
    return min(distances, key=lambda ratio: distances[ratio])


def open_row(session: Session, row: Row, prior: Sequence[str]) -> OpenedRow:
    """The dense model under this baseline's masks, for a row of an evaluation; `prior` are the
    texts of the history."""
    full_batch = row.criterion == FULL_BATCH
    shape, family = session.source.shape, session.source.family
    history = None if full_batch else history_of(session, prior)
    realised: dict[str, Any] = {}

    @contextmanager
    def opened() -> Iterator[nn.Module]:
        with probe_pruning(
            session.model,
            family,
            shape,
            ratio=ratio_for(row.keep, shape, row.units),
            history=history,
            units=row.units,
            full_batch=full_batch,
        ) as pruning:
            yield session.model
        # How much the masks keep is known only once they have been chosen.
        realised["keep"] = pruning.achieved_keep(shape)

    return OpenedRow(realised, opened, generates=False)


FULL_BATCH = "full-batch-probing"
BASELINES.update({"probe-pruning": open_row, FULL_BATCH: open_row})

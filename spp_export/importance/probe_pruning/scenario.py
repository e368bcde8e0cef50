"""The static builds: the scenario's text is the batch, and one mask is decided for good.

Probe Pruning decides in sequence, so the text goes layer by layer through what is already pruned.
One mask serves every later turn; tokens generated later were never probed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spp_export.calibration.activations import TokenBatch, input_device
from spp_export.common.arrays import FloatArray
from spp_export.common.errors import ScenarioError
from spp_export.common.progress import progress
from spp_export.importance.probe_pruning.blocks import (
    AttentionBlock,
    ProbedBlock,
    layer_blocks,
    masked,
)
from spp_export.importance.probe_pruning.history import History
from spp_export.importance.probe_pruning.probe import PositionMoments, Probe, choose, whole
from spp_export.importance.probe_pruning.score import Targets, fuse, ppsp
from spp_export.models.families import Family
from spp_export.models.shape import ModelShape, Units


@dataclass
class _Stream:
    """One batch on its way through the layers: its residual stream, and how attention is called."""

    real: Tensor
    residual: Tensor
    calls: list[dict[str, Any]] = field(default_factory=list)


def scenario_scores(
    model: nn.Module,
    family: Family,
    shape: ModelShape,
    batches: Sequence[TokenBatch],
    *,
    ratio: float,
    history: History | None,
    full: bool,
    units: Units,
    multiple: int = 64,
    description: str = "probing the scenario",
) -> tuple[FloatArray, FloatArray]:
    """PPsp scores of heads [L,H] and channels [L,I], each layer's on the pruned prefix.

    `ratio` of the `units` is pruned on the way by the published counts (`Targets`); all layers get
    scores of both kinds, also those and that which the prefix leaves whole. Query heads go one by
    one, K and V stay.

    pp-scenario: each text has its own probe, half its positions; at each position the squares are
    averaged over the texts that probed it, then fused with the history (None: not fused).
    full-batch-probing-scenario (`full`): every real token of every text is probed and the history
    is not read. An upper bound for masks chosen from this text, no oracle for other text.

    Raises ScenarioError where there is no text, UsageError for a ratio the layers cannot give.
    """
    if not batches:
        raise ScenarioError("the scenario has no text to probe; give it at least one token.")
    targets = Targets.at(shape, ratio, multiple)
    pairs = layer_blocks(model, family, shape)
    prior = None if full else history
    heads: list[FloatArray] = []
    channels: list[FloatArray] = []
    with torch.no_grad(), progress(description, len(pairs)) as advance_to:
        streams = [_entered(model, family, pairs, batch) for batch in batches]
        for done, pair in enumerate(pairs, start=1):
            for block, into, pruned in zip(
                pair, (heads, channels), (units != "channels", units != "heads"), strict=True
            ):
                inputs = [block.norm(stream.residual) for stream in streams]
                scores = _scores(block, streams, inputs, full=full, history=prior)
                kept = targets.keep(block, scores) if pruned else torch.ones_like(scores).bool()
                with masked(block, kept):
                    for stream, x in zip(streams, inputs, strict=True):
                        added = block.run(x, stream.calls[block.layer])
                        stream.residual = stream.residual.to(added.device) + added
                into.append(scores.cpu().double().numpy())
            advance_to(done)
    return np.stack(heads), np.stack(channels)


def _scores(
    block: ProbedBlock,
    streams: Sequence[_Stream],
    inputs: Sequence[Tensor],
    *,
    full: bool,
    history: History | None,
) -> Tensor:
    moments = PositionMoments(max(stream.real.shape[1] for stream in streams))
    for stream, x in zip(streams, inputs, strict=True):
        for rows, probe in _probes(stream, full, history):
            call = stream.calls[block.layer]
            moments.add(block.ahead(x[rows], probe, _of_rows(call, rows)), probe)
    seen = moments.counts > 0
    values = moments.values[seen]
    if history is not None:
        prior = history.of(block).to(values.device)
        values = fuse(values, prior[: len(seen)][seen[: len(prior)]])
    return ppsp(values.sum(0), block.consumer.weight, block.units)


def _probes(stream: _Stream, full: bool, history: History | None) -> Iterator[tuple[slice, Probe]]:
    """The probe of the whole batch, or one for each text."""
    real = stream.real.to(stream.residual.device)
    if full:
        yield slice(None), whole(real)
        return
    longest = None if history is None else history.positions
    for row in range(len(real)):
        rows = slice(row, row + 1)
        yield rows, choose(stream.residual[rows], real[rows], longest=longest)


def _of_rows(call: dict[str, Any], rows: slice) -> dict[str, Any]:
    """The rotary embedding of some rows, if there is one; it may be one for all."""
    parts = call.get("position_embeddings")
    if parts is None:
        return {}
    return {"position_embeddings": tuple(p if len(p) == 1 else p[rows] for p in parts)}


def _entered(
    model: nn.Module,
    family: Family,
    pairs: Sequence[tuple[ProbedBlock, ProbedBlock]],
    batch: TokenBatch,
) -> _Stream:
    """The stream before the first layer, and each layer's masks and rotary embedding, which do not
    depend on what is pruned."""
    stream = _Stream(batch.attention_mask.bool(), torch.empty(0))
    decoder = model.get_submodule(family.layers.rpartition(".")[0])
    device = input_device(model)

    def enter(_module: nn.Module, args: tuple[Any, ...]) -> None:
        stream.residual = args[0]

    def called(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream.calls.append({k: v for k, v in kwargs.items() if k != "hidden_states"})

    with ExitStack() as hooks:
        hooks.callback(pairs[0][0].norm.register_forward_pre_hook(enter).remove)
        for attention, _ in pairs:
            assert isinstance(attention, AttentionBlock)
            handle = attention.body.register_forward_pre_hook(called, with_kwargs=True)
            hooks.callback(handle.remove)
        decoder(
            input_ids=batch.input_ids.to(device),
            attention_mask=batch.attention_mask.to(device),
            use_cache=False,
        )
    return stream

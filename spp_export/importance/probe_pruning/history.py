"""What calibration text does at each position: the prior that a probe is fused with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spp_export.calibration.activations import TokenBatch, input_device
from spp_export.calibration.reading import TokenText
from spp_export.common.errors import UsageError
from spp_export.common.progress import progress
from spp_export.importance.probe_pruning.blocks import AttentionBlock, ProbedBlock, layer_blocks
from spp_export.importance.probe_pruning.probe import PositionMoments, whole
from spp_export.models.families import Family
from spp_export.models.session import Session
from spp_export.models.shape import ModelShape

MAX_POSITIONS = 512


@dataclass(frozen=True)
class History:
    """Mean squared inputs by position: `heads` [S_max,H*dh] of o_proj, `channels` [S_max,I] of
    down_proj, one per layer, float32. Zero at positions that no text reached.
    """

    heads: tuple[Tensor, ...]
    channels: tuple[Tensor, ...]

    @property
    def positions(self) -> int:
        """S_max: probes are chosen among the first so many tokens."""
        return len(self.heads[0])

    def of(self, block: ProbedBlock) -> Tensor:
        """The moments [S_max,C] of one block."""
        moments = self.heads if isinstance(block, AttentionBlock) else self.channels
        return moments[block.layer]


def gather_history(
    model: nn.Module,
    family: Family,
    shape: ModelShape,
    batches: Sequence[TokenBatch],
    *,
    positions: int = MAX_POSITIONS,
    description: str = "reading the history",
) -> History:
    """The history of texts on the dense model: means over the texts that reach a position.

    Texts are read up to `positions` tokens. The published history is 2,000 sequences of C4.

    Raises UsageError where there is no text.
    """
    if not batches:
        raise UsageError("probe pruning's history needs text, got none; give it a text collection.")
    decoder = model.get_submodule(family.layers.rpartition(".")[0])
    device = input_device(model)
    pairs = layer_blocks(model, family, shape)
    moments = [tuple(PositionMoments(positions) for _ in pair) for pair in pairs]
    real = torch.empty(0)

    def reader(into: PositionMoments) -> Callable[..., None]:
        def read(_module: nn.Module, args: tuple[Any, ...]) -> None:
            values = args[0]
            if values.dim() == 2:  # [B*S,I], as some MLPs read it
                values = values.unflatten(0, real.shape)
            into.add(values, whole(real.to(values.device)))

        return read

    done = 0
    with (
        ExitStack() as hooks,
        torch.no_grad(),
        progress(description, sum(batch.real_tokens for batch in batches)) as advance_to,
    ):
        for pair, into in zip(pairs, moments, strict=True):
            for block, seen in zip(pair, into, strict=True):
                handle = block.consumer.register_forward_pre_hook(reader(seen))
                hooks.callback(handle.remove)
        for batch in batches:
            real = batch.attention_mask[:, :positions].bool()
            decoder(
                input_ids=batch.input_ids[:, :positions].to(device),
                attention_mask=batch.attention_mask[:, :positions].to(device),
                use_cache=False,
            )
            done += batch.real_tokens
            advance_to(done)
    heads, channels = zip(*moments, strict=True)
    return History(_finished(heads), _finished(channels))


def _finished(moments: Sequence[PositionMoments]) -> tuple[Tensor, ...]:
    return tuple(layer.values.float().cpu() for layer in moments)


def history_of(session: Session, texts: Sequence[str | TokenText]) -> History:
    """Position-resolved moments of `texts` on the dense model."""
    from spp_export.calibration.activations import token_batches

    # One order, whatever the weights of the collections that they are of.
    ordered = sorted(texts, key=str)
    key = ("history", tuple(ordered))
    if key not in session.remembered:
        session.remembered[key] = gather_history(
            session.model,
            session.source.family,
            session.source.shape,
            token_batches(session.tokenizer, ordered),
        )
    remembered: History = session.remembered[key]
    return remembered

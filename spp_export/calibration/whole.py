"""Second moments of all channels of a wide MLP together, of a mixture of texts, a few layers at a
time.

Statistics that are kept have them in blocks, since those of all channels are too many to be kept
for every collection. A re-fit needs those of the mixture alone, one layer after the other, and so
can have the whole where memory takes a group of layers: a pass over the text for each group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from spp_export.calibration.mixture import WeightedTexts
from spp_export.common.arrays import FloatArray
from spp_export.common.memory import free_memory
from spp_export.models.session import Session
from spp_export.models.shape import ModelShape

if TYPE_CHECKING:
    from torch import Tensor

# What a re-fit of down_proj reads, as plan.json says it.
MOMENTS = ("whole", "blocks")
# Of the free memory, what the sums may take; of a card's, beside the activations.
_SHARE = {"cpu": 0.25, "cuda": 0.5}
# Passes over the text beyond which blocks are the better use of the time.
_MOST_PASSES = 4


def in_blocks(shape: ModelShape) -> bool:
    """Whether statistics of a model's MLPs are kept in blocks."""
    from spp_export.calibration.activations import CHANNEL_BLOCK

    return shape.channels > CHANNEL_BLOCK


def passes(session: Session, layers: int) -> int:
    """How many passes over the text give the whole moments of so many layers' channels: 0 where
    memory does not take them in four."""
    together = _layers_together(session)
    needed = -(-layers // together) if together else 0
    return needed if needed <= _MOST_PASSES else 0


def _layers_together(session: Session) -> int:
    """Layers whose moments memory holds at a time."""
    size = 4 * session.source.shape.channels**2
    kinds = {"cpu", session.device.partition(":")[0]} & set(_SHARE)
    return sum(int(_SHARE[kind] * free_memory(kind)) // size for kind in kinds)


class WholeMoments:
    """E[a a^T] [m,m], float32, of what down_proj reads in these layers, over a mixture of texts:
    the tokens of a part share its weight, and the weights sum to one."""

    def __init__(
        self, session: Session, parts: Sequence[WeightedTexts], layers: Sequence[int]
    ) -> None:
        self._session, self._parts = session, parts
        self._left = sorted(layers)
        self._gathered: dict[int, Callable[[], Tensor]] = {}

    def take(self, layer: int) -> FloatArray:
        """One layer's, which is given up for it: layers are asked for in their order, once each.

        Those of as many further layers as memory takes come in the same pass.
        """
        if layer not in self._gathered:
            self.gather()
        moments: FloatArray = self._gathered.pop(layer)().numpy()
        return moments

    def gather(self) -> None:
        """Make the pass for the next layers."""
        from spp_export.calibration.activations import (
            MixtureMoments,
            mixture_scales,
            observe,
            token_batches,
        )

        session = self._session
        count = max(1, _layers_together(session))
        group, self._left = self._left[:count], self._left[count:]
        texts = [text for part in self._parts for text in part.texts]
        batches = token_batches(session.tokenizer, texts)
        part_of_text = [i for i, part in enumerate(self._parts) for _ in part.texts]
        weights = [part.weight for part in self._parts]
        scales = mixture_scales(batches, part_of_text, weights)
        moments = MixtureMoments(group, session.source.shape.channels, scales)
        of_layers = f"{group[0] + 1} to {group[-1] + 1}"
        observe(
            session.reader,
            session.source.family,
            batches,
            [moments],
            description=f"moments of all channels of layers {of_layers}",
            matmul=session.matmul,
        )
        self._gathered = {layer: partial(moments.released, layer) for layer in group}

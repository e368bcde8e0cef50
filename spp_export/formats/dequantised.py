"""The weights that a file of another format holds, as a checkpoint that PyTorch runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spp_export.common.json_files import dump_json
from spp_export.formats.format import Promise
from spp_export.models.checkpoint.checkpoint import Checkpoint
from spp_export.models.checkpoint.writer import ShardWriter, TensorEntry, plan_shards

if TYPE_CHECKING:
    import torch

    from spp_export.calibration.activations import TokenBatch
    from spp_export.evaluation.parity import ReferenceLogits


def write_dequantised(
    checkpoint: Checkpoint, read: Callable[[str], NDArray[Any]], place: Path
) -> Path:
    """Write `checkpoint` with other weights to the new directory `place`, in float32.

    `read` gives each tensor by its name in the checkpoint. Weights pass through memory one at a
    time. Raises OutputError where the disk does not take them.
    """
    place.mkdir()
    (place / "config.json").write_text(dump_json(checkpoint.config), encoding="utf-8")
    entries = (
        TensorEntry(name, "F32", tensor.shape) for name, tensor in checkpoint.tensors.items()
    )
    with ShardWriter(place, plan_shards(entries), kept=False) as writer:
        for entry in writer.order:
            values = np.ascontiguousarray(read(entry.name), np.float32)
            writer.write(entry.name, [values.reshape(-1).view(np.uint32)])
    return place


def dequantised_place(
    against: Promise, promised: Checkpoint, read: Callable[[str], NDArray[Any]]
) -> Path:
    """The checkpoint that `promised` describes with the weights that `read` gives, written once."""
    place = against.scratch / "dequantised"
    return place if place.exists() else write_dequantised(promised, read, place)


def dequantised_logits(
    against: Promise,
    promised: Checkpoint,
    read: Callable[[str], NDArray[Any]],
    batches: Sequence[TokenBatch],
    exact: torch.dtype,
) -> ReferenceLogits:
    """Logits of the model in `dequantised_place`."""
    from spp_export.evaluation.batches import slim_reference

    session = against.session
    place = dequantised_place(against, promised, read)
    return slim_reference(place, batches, exact, session.torch_dtype, layerwise=session.from_disk)

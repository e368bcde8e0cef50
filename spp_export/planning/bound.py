"""What a slim model can gain at best, from its sizes alone: parameters, bytes, decode speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spp_export.models.shape import LayerShape, ModelShape
from spp_export.planning.latency import LatencyTable, PredictedLatency

# (batch, context): a chat on one's own device, and a busy server.
DECODE_CASES = ((1, 128), (16, 4096))


@dataclass(frozen=True, slots=True)
class DecodeBound:
    """The best possible speed-up of a decode step at one batch size and context length."""

    batch: int
    context: int
    speedup: float


@dataclass(frozen=True, slots=True)
class Predicted:
    """Sizes of the dense and the slim model, and the bounds that follow.

    File bytes count tensors, not headers. KV bytes are per token, in the stored dtype. latency:
    of a step by a measured table, where there is one.
    """

    dense_parameters: int
    parameters: int
    dense_file_bytes: int
    file_bytes: int
    dense_kv_bytes: int
    kv_bytes: int
    decode: tuple[DecodeBound, ...]
    latency: PredictedLatency | None = None

    def to_dict(self) -> dict[str, Any]:
        """The record for plan.json."""
        return {
            "parameters": {"dense": self.dense_parameters, "slim": self.parameters},
            "file_bytes": {"dense": self.dense_file_bytes, "slim": self.file_bytes},
            "kv_bytes_per_token": {"dense": self.dense_kv_bytes, "slim": self.kv_bytes},
            "decode_bound": [
                {"batch": case.batch, "context": case.context, "speedup": round(case.speedup, 4)}
                for case in self.decode
            ],
            **({"latency": self.latency.to_dict()} if self.latency else {}),
        }


def decode_bytes(
    shape: ModelShape,
    layers: Sequence[LayerShape],
    batch: int,
    context: int,
    element_bytes: int | None = None,
) -> int:
    """Bytes that one decode step of `batch` sequences with `context` cached tokens each must read.

    weights + batch * context * KV bytes per token, at `element_bytes` (default: the stored dtype).
    """
    size = shape.element_bytes if element_bytes is None else element_bytes
    weights = shape.decode_parameters(layers) * size
    return weights + batch * context * shape.kv_bytes_per_token(layers, size)


def decode_bound(
    shape: ModelShape,
    layers: Sequence[LayerShape],
    batch: int,
    context: int,
    element_bytes: int | None = None,
) -> float:
    """Best possible decode speed-up over the dense model: its bytes per step over the slim one's.

    Bytes alone decide, at any bandwidth, as long as decoding is bound by memory.
    """
    dense = decode_bytes(shape, shape.layers, batch, context, element_bytes)
    return dense / decode_bytes(shape, layers, batch, context, element_bytes)


def predicted(
    shape: ModelShape,
    layers: Sequence[LayerShape],
    written: ModelShape | None = None,
    latency: LatencyTable | None = None,
) -> Predicted:
    """What slicing the model to `layers` will give, before anything is written.

    `written` is the shape with the biases that compensation adds, where it adds any.
    """
    dense, slim = shape.parameters(shape.layers), (written or shape).parameters(layers)
    return Predicted(
        dense_parameters=dense,
        parameters=slim,
        dense_file_bytes=dense * shape.element_bytes,
        file_bytes=slim * shape.element_bytes,
        dense_kv_bytes=shape.kv_bytes_per_token(shape.layers),
        kv_bytes=shape.kv_bytes_per_token(layers),
        decode=tuple(
            DecodeBound(batch, context, decode_bound(shape, layers, batch, context))
            for batch, context in DECODE_CASES
        ),
        latency=latency.predict(shape, layers) if latency else None,
    )

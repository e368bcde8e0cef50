"""An ONNX graph that continues texts in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from spp_export.common.errors import UsageError
from spp_export.formats.format import Feed
from spp_export.formats.onnx.runtime.model import OrtModel

# Tokens of a prompt that a graph takes in at once.
_CHUNK = 256


class OnnxModel:
    """A model of ONNX Runtime."""

    runtime = "onnxruntime"

    def __init__(self, model: OrtModel) -> None:
        self._model = model

    @property
    def context_length(self) -> int:
        """Positions that the graph's rotary tables hold."""
        return self._model.context_length

    def start(self, capacity: int) -> Feed:
        """A new sequence, whose cache may be allocated at once."""
        decoding = self._model.start(1, capacity)

        def feed(ids: Sequence[int]) -> NDArray[Any]:
            # In parts, for the graph gives the logits of every token.
            for start in range(0, len(ids), _CHUNK):
                logits = decoding.feed([list(ids[start : start + _CHUNK])])
            last: NDArray[Any] = logits[0, -1]
            return last

        return feed


def load_onnx(directory: Path, device: str, dtype: str | None, threads: int | None) -> OnnxModel:
    """The model in a directory. Raises UsageError where it cannot be run here."""
    if dtype is not None:
        raise UsageError(
            f"--dtype {dtype}: {directory} is an ONNX graph, whose precision was chosen when it "
            "was exported. Drop --dtype."
        )
    return OnnxModel(OrtModel.load(directory, device=device, threads=threads))

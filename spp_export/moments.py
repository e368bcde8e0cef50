"""Moments of what o_proj reads and of the stream it writes into, per text collection.

Gathered by one pass of the dense model on first need and kept in the user's cache under a hash of
what decided them. Read layer by layer, so that a large model's never meet in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from spp_export.checkpoint.reader import as_bytes, blocks
from spp_export.checkpoint.source import Source
from spp_export.models import cache_directory
from spp_export.progress import Progress, no_progress

if TYPE_CHECKING:
    from torch import nn

    from spp_export.activations import SecondMoments, StreamSensitivity

FloatArray = np.ndarray[Any, np.dtype[np.floating[Any]]]

# A change of what is gathered, or how, must not meet files of the old kind.
_KIND = "o_proj moments and stream sensitivity, fp32, v3"
_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class Moments:
    """A weighted mixture of text collections' moments; the weights sum to one.

    parts: (cache file, weight). Averages are over the real tokens of each collection.
    """

    parts: tuple[tuple[Path, float], ...]

    def second(self, layer: int) -> FloatArray:
        """E[a a^T] [m,m] of the input of o_proj (m = H*dh), float32."""
        return self._mixed(f"o_proj/{layer}")

    def mean(self, layer: int) -> FloatArray:
        """E[a] [m]."""
        return self._mixed(f"o_proj_mean/{layer}")

    def sensitivity(self) -> FloatArray:
        """E 1/||r||^2 [L] of the residual stream after attention."""
        return self._mixed("sensitivity")

    def _mixed(self, name: str) -> FloatArray:
        total: FloatArray | None = None
        for path, weight in self.parts:
            with safe_open(path, framework="numpy") as file:
                tensor = file.get_tensor(name)
            part = tensor * tensor.dtype.type(weight)
            total = part if total is None else total + part
        assert total is not None
        return total


def gather(
    source: Source,
    texts: Sequence[str],
    dense: Callable[[], tuple[nn.Module, Any]],
    *,
    dtype: str = "float32",
    progress: Progress = no_progress,
    description: str = "gathering moments",
) -> Path:
    """Cache file of the moments of `texts`, made by one pass of the dense model if it is not there.

    `dense` gives the model and its tokenizer, and is asked only where the cache has nothing.
    `dtype` is the one that it computes in.
    """
    path = _path(source, texts, dtype)
    if _readable(path, source.shape.num_layers):
        return path
    from spp_export.activations import observe, token_batches

    model, tokenizer = dense()
    second, stream = observers(source)
    batches = token_batches(tokenizer, texts)
    observe(
        model,
        source.family,
        batches,
        [second, stream],
        progress=progress,
        description=description,
    )
    return store(source, texts, second, stream, dtype=dtype)


def observers(source: Source) -> tuple[SecondMoments, StreamSensitivity]:
    """Fresh observers of what `store` keeps."""
    from spp_export.activations import SecondMoments, StreamSensitivity

    shape = source.shape
    return (
        SecondMoments(shape.num_layers, shape.query_heads * shape.head_dim),
        StreamSensitivity(shape.num_layers),
    )


def store(
    source: Source,
    texts: Sequence[str],
    second: SecondMoments,
    stream: StreamSensitivity,
    *,
    dtype: str = "float32",
) -> Path:
    """Keep the moments that observers have gathered of `texts`; `dtype` as in `gather`."""
    path = _path(source, texts, dtype)
    tokens = np.float32(max(second.tokens, 1))
    layers = range(len(second.products))
    tensors = {f"o_proj/{i}": second.products[i].numpy() / tokens for i in layers}
    tensors |= {f"o_proj_mean/{i}": second.sums[i].numpy() / tokens for i in layers}
    tensors["sensitivity"] = stream.sums.numpy() / float(tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".moments-")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata={"tokens": str(second.tokens)})
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _path(source: Source, texts: Sequence[str], dtype: str) -> Path:
    decided = json.dumps([_KIND, source.fingerprint, _sample(source), dtype, list(texts)])
    key = hashlib.sha256(decided.encode()).hexdigest()
    return cache_directory() / "moments" / f"{key[:32]}.safetensors"


def _sample(source: Source) -> str:
    """SHA-256 of the first rows of every tensor.

    The fingerprint does not know a model from its fine-tuned sisters; their moments differ.
    """
    digest = hashlib.sha256()
    for tensor in source.tensors.values():
        digest.update(as_bytes(next(blocks(tensor, _SAMPLE_BYTES))))
    return digest.hexdigest()


def _readable(path: Path, layers: int) -> bool:
    """Whether a cache entry is whole; a damaged one costs a pass, not the export."""
    try:
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
    except (SafetensorError, OSError):
        return False
    return {"sensitivity", *(f"o_proj/{i}" for i in range(layers))} <= names

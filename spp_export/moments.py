"""Second moments of the inputs of o_proj: gathered on first need, kept by what decided them."""

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

from spp_export.checkpoint.source import Source
from spp_export.models import cache_directory
from spp_export.progress import Progress, no_progress

if TYPE_CHECKING:
    from torch import nn

    from spp_export.activations import SecondMoments

FloatArray = np.ndarray[Any, np.dtype[np.floating[Any]]]

# A change of what is gathered, or how, must not meet files of the old kind.
_KIND = "o_proj second moments, fp32, v1"


@dataclass(frozen=True)
class Moments:
    """E[a a^T] [L,m,m] and E[a] [L,m] of o_proj's inputs over `tokens` real tokens (m = H*dh)."""

    second: FloatArray
    mean: FloatArray
    tokens: int

    def mixed_with(self, other: Moments, weight: float) -> Moments:
        """`(1 - weight) * self + weight * other`, as a mixture of two populations of tokens."""
        return Moments(
            (1 - weight) * self.second + weight * other.second,
            (1 - weight) * self.mean + weight * other.mean,
            self.tokens + other.tokens,
        )


def moments_key(source: Source, texts: Sequence[str]) -> str:
    """What decides the moments: the model, the texts in order, and the kind."""
    digest = hashlib.sha256()
    digest.update(json.dumps([_KIND, source.fingerprint, list(texts)]).encode())
    return digest.hexdigest()


def load_or_gather(
    source: Source,
    texts: Sequence[str],
    dense: Callable[[], tuple[nn.Module, Any]],
    *,
    progress: Progress = no_progress,
    description: str = "gathering moments",
) -> Moments:
    """Moments of `texts` from the cache, or by one pass of the dense model, then cached.

    `dense` gives the model and its tokenizer, and is asked only where the cache has nothing.
    """
    path = _path(moments_key(source, texts))
    found = _read(path)
    if found is not None:
        return found
    from spp_export.activations import SecondMoments, observe, token_batches

    width = source.shape.query_heads * source.shape.head_dim
    sums = SecondMoments(source.shape.num_layers, width)
    model, tokenizer = dense()
    batches = token_batches(tokenizer, texts)
    observe(model, source.family, batches, [sums], progress=progress, description=description)
    return store(source, texts, sums)


def store(source: Source, texts: Sequence[str], sums: SecondMoments) -> Moments:
    """Keep moments gathered elsewhere (by `spp probe`, which sees the same activations)."""
    tokens = max(sums.tokens, 1)
    moments = Moments(
        sums.products.numpy() / np.float32(tokens),
        sums.sums.numpy() / np.float32(tokens),
        sums.tokens,
    )
    _write(_path(moments_key(source, texts)), moments)
    return moments


def _path(key: str) -> Path:
    return cache_directory() / "moments" / f"{key[:32]}.safetensors"


def _write(path: Path, moments: Moments) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"o_proj/{i}": layer for i, layer in enumerate(moments.second)}
    tensors |= {f"o_proj_mean/{i}": layer for i, layer in enumerate(moments.mean)}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".moments-")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata={"tokens": str(moments.tokens)})
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _read(path: Path) -> Moments | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            layers = sum(name.startswith("o_proj/") for name in file.keys())  # noqa: SIM118
            second = np.stack([file.get_tensor(f"o_proj/{i}") for i in range(layers)])
            mean = np.stack([file.get_tensor(f"o_proj_mean/{i}") for i in range(layers)])
            return Moments(second, mean, int(file.metadata()["tokens"]))
    except (SafetensorError, OSError, KeyError, ValueError):
        # A damaged cache entry costs one pass, not the export.
        path.unlink(missing_ok=True)
        return None

"""Where statistics of a text collection are kept: one file per kind in the user's cache.

A file's name is a hash of all that decided its content, so a hit is always the right one.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from spp_export.checkpoint.reader import as_bytes, blocks
from spp_export.checkpoint.source import Source
from spp_export.importance.statistics import FloatArray
from spp_export.models import cache_directory

# A change of what is gathered, or how, must not meet files of the old kind.
_VERSIONS = {
    "attention": "attention: what q and o read, and the stream after; fp32, v4",
    "mlp": "mlp: what gate and down read, and the stream after; fp32, blocks of 1536, v1",
    "gradients": "gradients: reductions of |W dL/dW| and gates; fp32, v1",
}
KINDS = tuple(_VERSIONS)
_SAMPLE_BYTES = 4096


def cache_paths(
    source: Source, texts: Sequence[str], kinds: Iterable[str], dtype: str
) -> dict[str, Path]:
    """The file of each kind of statistics of `texts`, whether or not it is there.

    `dtype` is the one that the model computes in.
    """
    sample = _sample(source)
    paths = {}
    for kind in kinds:
        decided = json.dumps([_VERSIONS[kind], source.fingerprint, sample, dtype, list(texts)])
        key = hashlib.sha256(decided.encode()).hexdigest()
        paths[kind] = cache_directory() / "statistics" / f"{key[:32]}.safetensors"
    return paths


def _sample(source: Source) -> str:
    """SHA-256 of the first rows of every tensor.

    The fingerprint does not know a model from its fine-tuned sisters; their statistics differ.
    """
    digest = hashlib.sha256()
    for tensor in source.tensors.values():
        digest.update(as_bytes(next(blocks(tensor, _SAMPLE_BYTES))))
    return digest.hexdigest()


def is_whole(path: Path, names: Iterable[str]) -> bool:
    """Whether a file is there with all its tensors; a damaged one costs a pass, not the export."""
    try:
        with safe_open(path, framework="numpy") as file:
            return set(names) <= set(file.keys())
    except (SafetensorError, OSError):
        return False


def write(path: Path, tensors: Mapping[str, FloatArray]) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".statistics-")
    os.close(handle)
    try:
        save_file(dict(tensors), temporary)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read(path: Path, name: str) -> FloatArray:
    """One tensor of a file."""
    with safe_open(path, framework="numpy") as file:
        tensor: FloatArray = file.get_tensor(name)
    return tensor

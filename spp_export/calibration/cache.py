"""Where statistics of a text collection are kept: one file per kind in the user's cache.

A file's name is a hash of all that decided its content, so a hit is always the right one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from io import FileIO
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from spp_export.calibration.reading import TokenText
from spp_export.calibration.stored import note
from spp_export.common.disk import clear_leftovers, free_space, working_place
from spp_export.common.errors import OutputError
from spp_export.common.manifest import hash_file
from spp_export.models.checkpoint.checkpoint import TOKENIZER_FILES, Checkpoint
from spp_export.models.checkpoint.companions import TOKENIZER_CONFIG, companion
from spp_export.models.checkpoint.reader import as_bytes, blocks
from spp_export.models.checkpoint.writer import Shard, TensorEntry, header_of
from spp_export.models.hub import cache_directory
from spp_export.models.products import Matmul
from spp_export.models.session import Session
from spp_export.models.shape import ModelShape

# A change of what is gathered, or how, must not meet files of the old kind.
_VERSIONS = {
    "attention": "attention: what q and o read, and the stream after; fp32, v5",
    "mlp": "mlp: what gate and down read, and the stream after; fp32, blocks of 1536, v2",
    "experts": "experts: what each writes, and the stream after; fp32, v1",
    "expert channels": "experts: what down reads, by the router's weight; fp32, v1",
    "gradients": "gradients: reductions of |W dL/dW| and gates; fp32, v2",
    "attention loss": "attention: what o reads, by the squared gradient of its output; fp32, v2",
    "mlp loss": "mlp: what down reads, by the squared gradient of its output; fp32, v2",
}
KINDS = tuple(_VERSIONS)
# Of kinds whose moments are in units of the loss.
LOSS = " loss"
_SAMPLE_BYTES = 4096
Array = np.ndarray[Any, np.dtype[Any]]
_DTYPES = {"float32": "F32", "float64": "F64", "int32": "I32"}


def cache_paths(
    source: Checkpoint,
    collections: Sequence[Sequence[str | TokenText]],
    kinds: Iterable[str],
    dtype: str,
    matmul: Matmul = "float32",
) -> list[dict[str, Path]]:
    """The file of each kind of statistics of each collection of texts, whether or not it is there.

    `dtype` is the one that the model computes in, and `matmul` that of its products.
    """
    computed = dtype if matmul == "float32" else f"{dtype}, products in {matmul}"
    kinds, model = tuple(kinds), model_key(source)
    collected = []
    for texts in collections:
        content, by_loss = [_content(text) for text in texts], [_predicted(t) for t in texts]
        paths = {}
        for kind in kinds:
            weighted = [by_loss] if kind.endswith(LOSS) else []
            decided = json.dumps([_VERSIONS[kind], *model, computed, content, *weighted])
            key = hashlib.sha256(decided.encode()).hexdigest()
            paths[kind] = cache_directory() / "statistics" / f"{key[:32]}.safetensors"
        collected.append(paths)
    return collected


def model_key(source: Checkpoint) -> tuple[str, str, str]:
    """What tells a model, its weights and its tokenizer from all others."""
    return source.fingerprint, _sample(source), _tokenizer(source.path)


def _content(text: str | TokenText) -> Any:
    return text.runs if isinstance(text, TokenText) else text


def _predicted(text: str | TokenText) -> Any:
    """What else decides moments in units of the loss: who speaks, and gradients that are known."""
    if not isinstance(text, TokenText):
        return None
    known = b"" if text.gradients is None else np.ascontiguousarray(text.gradients).tobytes()
    spoken = [answers.hex() for answers in text.answers or ()]
    return spoken, hashlib.sha256(known).hexdigest()


def _sample(source: Checkpoint) -> str:
    """SHA-256 of the first rows of every tensor.

    The fingerprint does not know a model from its fine-tuned sisters; their statistics differ.
    """
    digest = hashlib.sha256()
    for tensor in source.tensors.values():
        digest.update(as_bytes(next(blocks(tensor, _SAMPLE_BYTES))))
    return digest.hexdigest()


def _tokenizer(directory: Path) -> str:
    """SHA-256 of the files that say how text is read."""
    digest = hashlib.sha256()
    for name in (TOKENIZER_CONFIG, *TOKENIZER_FILES):
        if path := companion(directory, name):
            digest.update(f"{name}\0{hash_file(path).sha256}\n".encode())
    return digest.hexdigest()


def is_whole(path: Path, names: Iterable[str]) -> bool:
    """Whether a file is there with all its tensors; a damaged one costs a pass, not the export."""
    try:
        with safe_open(path, framework="numpy") as file:
            return set(names) <= set(file.keys())
    except (SafetensorError, OSError):
        return False


def write(path: Path, tensors: Mapping[str, Array], model: str = "") -> None:
    """Write a file whole or not at all. Raises OutputError where the cache does not take it."""
    sizes = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    with writing(path, sizes, model) as put:
        for name, tensor in tensors.items():
            put(name, tensor)


@contextmanager
def writing(
    path: Path, sizes: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]], model: str = ""
) -> Iterator[Callable[[str, Array], None]]:
    """As `write`, of tensors that are given one at a time, in any order, to what this yields.

    `sizes` has dtype and shape of each; the file is there once all were given. `model` is the name
    that the list of the cache shows.
    """
    # Wider elements first, so that each tensor is aligned to its element.
    order = sorted(sizes, key=lambda name: -sizes[name][0].itemsize)
    entries = [TensorEntry(name, _DTYPES[sizes[name][0].name], sizes[name][1]) for name in order]
    shard = Shard(path.name, tuple(entries))
    header = header_of(shard, {"model": model})
    starts = accumulate((entry.nbytes for entry in entries), initial=len(header))
    begins = dict(zip(order, starts, strict=False))
    with ExitStack() as stack:
        with _reporting(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            clear_leftovers(path)
            new = stack.enter_context(working_place(path)) / path.name
            file = stack.enter_context(FileIO(new, "xb"))
            os.truncate(new, len(header) + shard.nbytes)
            _write_at(file, 0, memoryview(header))

        def put(name: str, tensor: Array) -> None:
            assert (tensor.dtype, tensor.shape) == sizes[name], name
            with _reporting(path):
                _write_at(file, begins.pop(name), as_bytes(np.ascontiguousarray(tensor)))

        yield put
        assert not begins, f"{min(begins)} was not given"
        with _reporting(path):
            file.close()
            new.replace(path)
    note(path)


def _write_at(file: FileIO, begin: int, data: memoryview) -> None:
    file.seek(begin)
    done = 0
    while done < len(data):
        done += file.write(data[done:])


@contextmanager
def _reporting(path: Path) -> Iterator[None]:
    """OSError as one line about the cache."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path.parent}: {path.parent.name} cannot be kept ({error.strerror or error}). "
            "Make room, or set SPP_CACHE to a directory on another disk."
        ) from error


def read(path: Path, name: str) -> Any:
    """One tensor of a file, as it was written."""
    with safe_open(path, framework="numpy") as file:
        return file.get_tensor(name)


def require_cache_space(
    session: Session, texts: Sequence[Sequence[str | TokenText]], kinds: Sequence[str]
) -> None:
    """OutputError unless the user's cache has room for the statistics of these collections of texts
    that are not in it yet."""
    missing = {
        path: statistics_bytes(session.source.shape, kind)
        for paths in cache_paths(session.source, texts, kinds, session.dtype, session.matmul)
        for kind, path in paths.items()
        if not path.exists()
    }
    count, free = sum(missing.values()), free_space(cache_directory())
    if free < count:
        raise OutputError(
            f"{cache_directory()}: statistics of the dense model need {count / 1e9:.1f} GB in the "
            f"cache, {free / 1e9:.1f} GB are free. Make room, set SPP_CACHE to another disk, or "
            "use --compensate none."
        )


def statistics_bytes(shape: ModelShape, kind: str) -> int:
    """Bytes of a file of statistics; those of gradients are small."""
    from spp_export.calibration.activations import channel_block

    heads = shape.query_heads * shape.head_dim
    block = channel_block(shape.channels)
    second = {"attention": heads**2, "mlp": -(-shape.channels // block) * block**2}
    layers = {"attention": sum(shape.has_heads), "mlp": sum(shape.has_channels)}
    name = kind.removesuffix(LOSS)
    if name == "expert channels":
        return 4 * sum(shape.sparse) * shape.experts * shape.expert_channels
    return 4 * layers.get(name, 0) * second.get(name, 0)

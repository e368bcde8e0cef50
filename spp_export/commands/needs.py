"""What each command that writes a model takes of the machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from spp_export.calibration.cache import cache_paths
from spp_export.common.disk import free_space
from spp_export.common.errors import OutputError
from spp_export.common.memory import resident_parameters
from spp_export.formats.decoder import Decoder
from spp_export.formats.gguf.encode import row_bytes
from spp_export.formats.gguf.options import BLOCK, GgufOptions
from spp_export.formats.onnx.options import OnnxOptions
from spp_export.formats.onnx.quantise import BLOCK_SIZES
from spp_export.models.checkpoint.companions import companion
from spp_export.models.checkpoint.dtypes import ELEMENT_BYTES, FLOAT_DTYPES
from spp_export.models.checkpoint.source import TOKENIZER_FILES
from spp_export.models.hub import cache_directory
from spp_export.models.session import Session
from spp_export.models.shape import ModelShape
from spp_export.preflight import Needs

_ELEMENT_BYTES = {name: ELEMENT_BYTES[stored] for stored, name in FLOAT_DTYPES.items()}
# What an interpreter with torch takes, and what is computed with the weights.
_PROGRAM_MEMORY = 700_000_000
# Code, plan, report, card and manifest.
_SMALL_FILES = 1_000_000
# Scales are float32, zero points as wide as the values.
_QUANTISED_BYTES = {
    "int4": 0.5 + 4.5 / BLOCK_SIZES[4],
    "int8": 1 + 5 / BLOCK_SIZES[8],
    "int8-dynamic": 1.0,
}


def export_needs(
    session: Session,
    target: Path,
    slim_bytes: int,
    *,
    runs_model: bool,
    verify: bool,
    onnx: OnnxOptions | None = None,
    gguf: GgufOptions | None = None,
) -> Needs:
    """Of writing a slim checkpoint of so many bytes, and a graph or a GGUF file made of it.

    runs_model: the dense model is asked about text, before it is sliced.
    """
    source, shape = session.source, session.source.shape
    size = _ELEMENT_BYTES[session.dtype]
    slim, dense = slim_bytes // shape.element_bytes, shape.parameters(shape.layers)
    disk = {"slim checkpoint": slim_bytes, "other files": _other_files(source.path)}
    if onnx:
        disk |= graph_bytes(onnx, slim, verify)
    if gguf:
        disk |= gguf_bytes(gguf, source.dtype, slim)
    memory = _base(max(tensor.nbytes for tensor in source.tensors.values()))
    # On another device only tensors on their way are in the machine's memory.
    if session.device != "cpu" or not (runs_model or verify):
        return Needs(target, disk, memory, 0)
    memory[f"dense model in {session.dtype}"] = size * dense
    if verify:
        memory[f"slim model in {session.dtype}"] = size * slim
    least = size * (dense if session.layerwise is False else resident_parameters(shape))
    return Needs(target, disk, memory, least, session.from_disk)


def convert_needs(
    target: Path,
    checkpoint: Path,
    decoder: Decoder,
    options: OnnxOptions | GgufOptions,
    verify: bool,
) -> Needs:
    """Of writing a checkpoint as a graph, whose tensors pass through memory one at a time, or as a
    GGUF file, which is checked a tensor at a time."""
    parameters = decoder.shape.parameters(decoder.layers)
    if isinstance(options, GgufOptions):
        stored = next(iter(decoder.tensors.values())).dtype
        file = gguf_bytes(options, stored, parameters)
        memory = _base(4 * max(math.prod(tensor.shape) for tensor in decoder.tensors.values()))
        if verify:
            memory |= {"model in float32": 4 * parameters}
        return Needs(target, {**file, "other files": _other_files(checkpoint)}, memory, 0)
    disk = {**graph_bytes(options, parameters, verify), "other files": _other_files(checkpoint)}
    largest = max(math.prod(tensor.shape) for tensor in decoder.tensors.values())
    least = options.element_bytes * largest
    memory = _base(least)
    if verify:
        model = _ELEMENT_BYTES[options.torch_dtype] * parameters
        memory |= {f"model in {options.torch_dtype}": model, "graph": disk["graph"]}
    return Needs(target, disk, memory, least)


def probe_needs(session: Session, target: Path, domains: int) -> Needs:
    """Of the offline stage: what it writes is small, what it runs is the dense model."""
    shape = session.source.shape
    units = shape.hidden_size + shape.query_heads + shape.channels
    needs = export_needs(session, target, 0, runs_model=True, verify=False)
    return replace(needs, disk={"artifacts": 4 * domains * shape.num_layers * units})


def require_cache_space(
    session: Session, texts: Sequence[Sequence[str]], kinds: Sequence[str]
) -> None:
    """OutputError unless the user's cache has room for the statistics of these collections of texts
    that are not in it yet."""
    missing = {
        path: _statistics_bytes(session.source.shape, kind)
        for each in texts
        for kind, path in cache_paths(session.source, each, kinds, session.dtype).items()
        if not path.exists()
    }
    count, free = sum(missing.values()), free_space(cache_directory())
    if free < count:
        raise OutputError(
            f"{cache_directory()}: statistics of the dense model need {count / 1e9:.1f} GB in the "
            f"cache, {free / 1e9:.1f} GB are free. Make room, set SPP_CACHE to another disk, or "
            "use --compensate none."
        )


def graph_bytes(options: OnnxOptions, parameters: int, verify: bool) -> dict[str, int]:
    """Bytes of a graph, and of the unquantised one that a quantised one is compared with."""
    plain = options.element_bytes * parameters
    if options.quant is None:
        return {"graph": plain}
    graph = round(_QUANTISED_BYTES[options.quant] * parameters)
    return {"graph": graph, "graph to compare with": plain if verify else 0}


def gguf_bytes(options: GgufOptions, stored_dtype: str, parameters: int) -> dict[str, int]:
    """Bytes of a GGUF file of a checkpoint in `stored_dtype`."""
    kind = options.resolved(stored_dtype).kind
    return {"GGUF file": row_bytes(BLOCK, kind) * parameters // BLOCK}


def _base(largest: int) -> dict[str, int]:
    return {"program": _PROGRAM_MEMORY, "largest tensor, twice": 2 * largest}


def _other_files(directory: Path) -> int:
    """Bytes of what travels beside the weights."""
    paths = (companion(directory, name) for name in TOKENIZER_FILES)
    return _SMALL_FILES + sum(path.stat().st_size for path in paths if path)


def _statistics_bytes(shape: ModelShape, kind: str) -> int:
    """Bytes of a file of statistics; those of gradients are small."""
    from spp_export.calibration.activations import channel_block

    heads = shape.query_heads * shape.head_dim
    block = channel_block(shape.channels)
    second = {"attention": heads**2, "mlp": -(-shape.channels // block) * block**2}
    return 4 * shape.num_layers * second.get(kind, 0)

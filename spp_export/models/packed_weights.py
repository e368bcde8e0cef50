"""Weights of GPTQ and AWQ, which transformers reads only to run them: integers packed in 32 bits.

GPTQ (Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023) as AutoGPTQ and GPTQModel store it, and AWQ (Lin et al., "AWQ:
Activation-aware Weight Quantization for LLM Compression and Acceleration", MLSys 2024) as AutoAWQ
does, in its layout "gemm".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spp_export.common.errors import ModelError
from spp_export.common.json_files import shown
from spp_export.models.checkpoint.dtypes import FLOAT_DTYPES, all_finite, from_float
from spp_export.models.checkpoint.header import StoredTensor, show
from spp_export.models.checkpoint.reader import as_array, blocks, read_float
from spp_export.models.checkpoint.writer import ShardWriter, TensorEntry, plan_shards

_WORD = 32
# The columns of eight that AWQ's kernels find in the fields of a word, from the lowest bits on.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class Packing:
    """How weights [inputs, outputs] are packed.

    axis    of qweight along which a word holds several of its integers
    order   where a word's fields, from the lowest bits on, belong among so many integers
    offset  what is added to stored zero points
    """

    bits: int
    axis: int
    order: tuple[int, ...]
    offset: int
    group_size: int


def packing_of(method: str, settings: Mapping[str, Any]) -> Packing:
    """The packing that a quantization_config of GPTQ or AWQ describes. ModelError for another."""
    gptq = method == "gptq"
    form, known = (
        (settings.get("checkpoint_format") or "gptq", ("gptq", "gptq_v2"))
        if gptq
        else (str(settings.get("version") or "gemm").lower(), ("gemm",))
    )
    bits = settings.get("bits", settings.get("w_bit"))
    size = settings.get("group_size", settings.get("q_group_size"))
    widths = (2, 4, 8) if gptq else (4,)
    if form not in known or type(bits) is not int or bits not in widths:
        raise ModelError(
            f"config.json: {method.upper()} of {shown(bits)} bits in the layout {shown(form)}; "
            f"expected {' or '.join(map(str, widths))} bits in {' or '.join(known)}. Give the "
            "full-precision model."
        )
    if type(size) is not int or (size < 1 and size != -1):
        raise ModelError(
            f"config.json: group_size must be a number of weights, or -1, got {shown(size)}. "
            "Correct it."
        )
    order = tuple(range(_WORD // bits)) if gptq else _AWQ_ORDER
    # The first version of GPTQ's files stores a zero point less one.
    return Packing(bits, 0 if gptq else 1, order, int(form == "gptq"), size)


def write_unpacked(
    stored: Mapping[str, StoredTensor], packing: Packing, dtype: str, place: Path
) -> Iterable[int]:
    """Write a checkpoint with its packed weights in `dtype` to the new directory `place`; what is
    not packed stays as it is. Yields the bytes written so far.

    Tensors pass through memory one at a time. Raises ModelError for weights that are not packed as
    they should be, OutputError where the disk does not take them.
    """
    modules = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    parts = {f"{module}.{part}" for module in modules for part in _PARTS}
    sizes = {module: _check_parts(module, stored, packing) for module in modules}
    entries = [
        TensorEntry(name, tensor.dtype, tensor.shape)
        for name, tensor in stored.items()
        if name not in parts
    ]
    for entry in entries:
        if entry.dtype not in FLOAT_DTYPES:
            raise ModelError(
                f"tensor {show(entry.name)} is {entry.dtype}, expected one of "
                f"{', '.join(FLOAT_DTYPES)}. The checkpoint is not of GPTQ or AWQ alone."
            )
    entries += [TensorEntry(f"{module}.weight", dtype, size) for module, size in sizes.items()]
    place.mkdir()
    done = 0
    with ShardWriter(place, plan_shards(entries)) as writer:
        for entry in writer.order:
            module = entry.name.removesuffix(".weight")
            if module in sizes:
                bits = from_float(unpacked(module, stored, packing), dtype)
                if not all_finite(bits, dtype):
                    raise ModelError(
                        f"tensor {show(entry.name)} has a value that {dtype} does not hold. The "
                        "checkpoint is damaged; fetch the model again."
                    )
                writer.write(entry.name, [np.ascontiguousarray(bits)])
            else:
                writer.write(entry.name, blocks(stored[entry.name]))
            done += entry.nbytes
            yield done


def unpacked(
    module: str, stored: Mapping[str, StoredTensor], packing: Packing
) -> NDArray[np.float32]:
    """The weight [outputs, inputs] of a module: (integer - zero point) * scale, by the group of its
    input."""
    integers = _fields(as_array(stored[f"{module}.qweight"]), packing, packing.axis)
    zeros = _fields(as_array(stored[f"{module}.qzeros"]), packing, 1)
    zeros = (zeros + np.uint32(packing.offset)) % np.uint32(1 << packing.bits)
    scales = read_float(stored[f"{module}.scales"]).astype(np.float32)
    inputs = len(integers)
    index = stored.get(f"{module}.g_idx")
    if index is None:
        size = inputs if packing.group_size == -1 else packing.group_size
        groups = np.arange(inputs) // size
    else:
        groups = as_array(index).view(np.int32).astype(np.int64)
    if groups.min() < 0 or groups.max() >= len(scales):
        raise ModelError(
            f"tensor {show(f'{module}.qweight')} has inputs of group {int(groups.max())}, and "
            f"there are {len(scales)} groups. Fetch the model again."
        )
    # Both are exact in float32, and the product is rounded once.
    weight: NDArray[np.float32] = integers.astype(np.float32) - zeros[groups].astype(np.float32)
    weight *= scales[groups]
    return weight.T


def _fields(words: NDArray[Any], packing: Packing, axis: int) -> NDArray[np.uint32]:
    """The integers that words [rows, columns] hold along an axis."""
    shifts = np.arange(0, _WORD, packing.bits, dtype=np.uint32)
    fields: NDArray[np.uint32] = words.view(np.uint32)[..., None] >> shifts
    fields &= np.uint32((1 << packing.bits) - 1)
    fields = fields[..., np.argsort(packing.order)]
    rows, columns, count = fields.shape
    if axis == 1:
        return fields.reshape(rows, columns * count)
    return fields.transpose(0, 2, 1).reshape(rows * count, columns)


def _check_parts(
    module: str, stored: Mapping[str, StoredTensor], packing: Packing
) -> tuple[int, int]:
    """Outputs and inputs of a packed weight. ModelError where its parts do not belong together."""
    parts = {part: stored.get(f"{module}.{part}") for part in _PARTS}
    missing = [part for part in _PARTS[:3] if parts[part] is None]
    if missing or f"{module}.weight" in stored:
        what = f"no {show(f'{module}.{missing[0]}')}" if missing else "a weight besides"
        raise ModelError(f"tensor {show(f'{module}.qweight')} has {what}. Fetch the model again.")
    count = _WORD // packing.bits
    words, zeros, scales, index = (parts[part] for part in _PARTS)
    assert words is not None
    assert zeros is not None
    assert scales is not None
    shape = words.shape if len(words.shape) == 2 else (0, 0)
    inputs, outputs = (n * count if axis == packing.axis else n for axis, n in enumerate(shape))
    size = inputs if packing.group_size == -1 else packing.group_size
    groups = -(-inputs // size) if inputs else 0
    fits = (
        inputs > 0
        and outputs > 0
        and scales.shape == (groups, outputs)
        and scales.dtype in FLOAT_DTYPES
        and zeros.shape == (groups, outputs // count)
        and (index is None or (index.shape == (inputs,) and index.dtype == "I32"))
        and (index is None or packing.axis == 0)
        and {words.dtype, zeros.dtype} == {"I32"}
    )
    if not fits:
        raise ModelError(
            f"tensor {show(f'{module}.qweight')} of shape {list(words.shape)} has qzeros "
            f"{list(zeros.shape)} and scales {list(scales.shape)}, which is no weight of "
            f"{packing.bits} bits in groups of {packing.group_size}. Config and weights are of "
            "different models."
        )
    return outputs, inputs

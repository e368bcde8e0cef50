"""`--dequantize`: a quantised checkpoint as one of full precision, made once in the user's cache.

What the stored bits stand for is computed by transformers, on the CPU; of GPTQ and AWQ, which it
does not dequantise, by `packed_weights`. The rest of `spp` sees a checkpoint like any other.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spp_export.common.disk import free_space, sync
from spp_export.common.errors import (
    CheckpointError,
    ModelError,
    OutputError,
    ResourceError,
    SppError,
    UsageError,
    reason_of,
)
from spp_export.common.json_files import dump_json, shown
from spp_export.common.memory import free_memory
from spp_export.common.progress import progress, quiet_transformers
from spp_export.models.checkpoint.checkpoint import read_config
from spp_export.models.checkpoint.companions import check_companions, copy_companions
from spp_export.models.checkpoint.dtypes import FLOAT_DTYPES
from spp_export.models.checkpoint.header import StoredTensor, show
from spp_export.models.checkpoint.reader import (
    INDEX_NAME,
    require_unchanged,
    stored_tensors,
)
from spp_export.models.families import family_of
from spp_export.models.hub import (
    DEQUANTISED_NAME,
    ModelLocation,
    dequantised_name,
    dequantised_record,
    locate_model,
    made_once,
    models_directory,
)
from spp_export.models.packed_weights import packing_of, write_unpacked
from spp_export.models.quantised import (
    LOADED,
    PACKED,
    READING,
    bits_of,
    full_precision,
    quant_method,
    require_way,
    settings_of,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# A checkpoint in the cache that was made in another way is made anew.
_VERSION = 1
_SHARD_BYTES = 5_000_000_000
_GENERATION_CONFIG, _TEMPLATES = "generation_config.json", "additional_chat_templates"
_KEPT_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".md")
_KEPT_STEMS = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
_ARCHITECTURES = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
_FP8 = ("F8_E4M3", "F8_E5M2")
# Stored dtypes of weights that are nothing without their scales.
_SCALED = {"fp8": _FP8, "mxfp8": _FP8, "compressed-tensors": (*_FP8, "I8")}
_DEFAULT_BLOCK = [128, 128]
# A tensor may hold as many experts.
_MOST_PER_TENSOR = 1000
# Values that one stored element may hold: two of four bits in a byte.
_VALUES_PER_BYTE = 2
# Of the weights, what reading them takes beside them.
_READING_SHARE = 1.1


def find_model(model: str, *, dequantize: bool = False) -> ModelLocation:
    """`locate_model`, and where it is asked for, the dequantised checkpoint in its place.

    Raises ModelError for a model that could not be sliced when it is dequantised, before that; and
    what `dequantised` does.
    """
    location = locate_model(model)
    if not dequantize:
        return location
    config = read_config(location.path)
    if quant_method(config) is not None:
        family_of(full_precision(config))
    return dequantised(location)


def dequantised(location: ModelLocation) -> ModelLocation:
    """The checkpoint of what the weights of a quantised one stand for, in the dtype that its config
    names, or float32 without; made where the cache does not have it.

    Raises UsageError for a checkpoint that is not quantised, ModelError for a method that nothing
    here undoes and for a checkpoint that is not what its config says, OutputError and ResourceError
    where disk or memory do not hold the result.
    """
    config = read_config(location.path)
    method = quant_method(config)
    if method is None:
        raise UsageError(f"{location.name}: is not quantised. Drop --dequantize.")
    title = require_way(method).title
    stored = stored_tensors(location.path)
    check_companions(location.path)
    kept = _kept_files(location.path)
    name = dequantised_name(location.name, title)
    target = models_directory() / f"dequantised-{_key(config, location.path, kept, stored)}"

    def make(scratch: Path) -> Path:
        made = scratch / "model"
        try:
            _write(location, config, method, stored, made)
        except SppError:
            raise
        except OSError as error:
            raise OutputError(f"{target.parent}: cannot be written ({error.strerror}).") from error
        _complete(location, config, kept, made)
        _seal(made, name, method, bits_of(config))
        return made

    made_once(target, _is_whole, make)
    # Its age in `spp cache` is the time since it was last used.
    os.utime(target)
    return ModelLocation(target, name)


def _write(
    location: ModelLocation,
    config: Mapping[str, Any],
    method: str,
    stored: Mapping[str, StoredTensor],
    made: Path,
) -> None:
    """Write the dequantised weights to the new directory `made`."""
    import torch

    dtype = getattr(torch, _dtype_name(config))
    _check_layers(location, config, stored)
    _check_scales(location, config, method, stored)
    values = sum(_most_values(config, tensor) for tensor in stored.values())
    if require_way(method).way == PACKED:
        _require_room(location, values * dtype.itemsize, in_memory=False)
        _unpack(location, config, method, stored, made, values * dtype.itemsize)
    else:
        needed = _parameters(location, config)
        if needed > values:
            raise ModelError(
                f"{location.name}: config.json is of a model of {needed} parameters, and the "
                f"files hold at most {values}. Config and weights are of different models."
            )
        _require_room(location, needed * dtype.itemsize, in_memory=True)
        with quiet_transformers(), progress(f"dequantising {location.name}", None):
            _save(_by_transformers(location, config, method, dtype), location, made)
    require_unchanged(stored.values())


def _unpack(
    location: ModelLocation,
    config: Mapping[str, Any],
    method: str,
    stored: Mapping[str, StoredTensor],
    made: Path,
    most_bytes: int,
) -> None:
    packing = packing_of(method, settings_of(config))
    dtype = next(key for key, name in FLOAT_DTYPES.items() if name == _dtype_name(config))
    try:
        with progress(f"dequantising {location.name}", float(most_bytes)) as advance_to:
            for done in write_unpacked(stored, packing, dtype, made):
                advance_to(float(done))
    except (OutputError, CheckpointError):
        raise
    except ModelError as error:
        raise ModelError(f"{location.name}: {error}") from error


def _by_transformers(
    location: ModelLocation, config: Mapping[str, Any], method: str, dtype: torch.dtype
) -> PreTrainedModel:
    """The model with its weights dequantised."""
    import transformers
    from transformers import AutoConfig
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as KNOWN

    settings = dict(settings_of(config))
    if require_way(method).way == READING:
        reader = KNOWN.get(method)
        if reader is None or "dequantize" not in inspect.signature(reader).parameters:
            raise ModelError(
                f"{location.name}: transformers {transformers.__version__} does not dequantise "
                f"{require_way(method).title} on reading. Install a newer one."
            )
        settings["dequantize"] = True
    try:
        # Given beside the model's own settings, these would replace some and leave others.
        changed = AutoConfig.from_pretrained(location.path, trust_remote_code=False)
        changed.quantization_config = settings
        model, found = _class(config).from_pretrained(
            location.path,
            config=changed,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        if require_way(method).way == LOADED:
            _check_rows(location, model)
            model = model.dequantize()
    except SppError:
        raise
    except ImportError as error:
        raise ModelError(
            f"{location.name}: {require_way(method).title} needs what is missing here: "
            f"{reason_of(error)}"
        ) from error
    except Exception as error:  # transformers raises a wide family of errors
        raise _refused(location, error) from error
    odd = sorted(str(name) for kind in ("missing_keys", "unexpected_keys") for name in found[kind])
    if odd:
        raise ModelError(
            f"{location.name}: transformers finds no place for {show(odd[0])}, or no such tensor. "
            "Config and weights are of different models; fetch the model again."
        )
    result: PreTrainedModel = model
    return result


def _check_rows(location: ModelLocation, model: PreTrainedModel) -> None:
    """Blocks lie one after another in memory, across the rows of a weight. On the CPU bitsandbytes
    takes them to begin anew in each row, and computes other weights where they do not."""
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None and state.shape[-1] % state.blocksize:
            raise ModelError(
                f"{location.name}: tensor {show(name)} has rows of {state.shape[-1]} weights, "
                f"which blocks of {state.blocksize} do not divide, and bitsandbytes dequantises "
                "wrongly. Give the full-precision model."
            )


def _save(model: PreTrainedModel, location: ModelLocation, made: Path) -> None:
    """Write a model's weights by the names that published checkpoints have."""
    import torch
    from transformers import GenerationConfig

    state = model.state_dict()
    for name, tensor in state.items():
        if str(tensor.dtype).removeprefix("torch.") not in FLOAT_DTYPES.values():
            raise ModelError(
                f"{location.name}: transformers left {show(name)} in {tensor.dtype}. "
                "Give the full-precision model."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                f"{location.name}: tensor {show(name)} has a value that is not finite when it is "
                "dequantised. The checkpoint is damaged; fetch the model again."
            )
    try:
        # A model that was read remembers how, and would be quantised again when it is saved.
        with torch.device("meta"):
            plain = type(model)(model.config)
        plain.load_state_dict(state, assign=True)
        plain.tie_weights()
        # Settings of sampling that transformers refuses to write are copied as they are.
        plain.generation_config = GenerationConfig()
        plain.save_pretrained(made, max_shard_size=_SHARD_BYTES)
    except OSError:
        raise
    except Exception as error:
        raise _refused(location, error) from error


def _complete(
    location: ModelLocation, config: Mapping[str, Any], kept: list[str], made: Path
) -> None:
    """Put the model's own config and other files beside its dequantised weights."""
    (made / _GENERATION_CONFIG).unlink(missing_ok=True)
    (made / "config.json").write_text(dump_json(full_precision(config)), encoding="utf-8")
    copy_companions(location.path, kept, made)
    if (templates := location.path / _TEMPLATES).is_dir():
        (made / _TEMPLATES).mkdir()
        copy_companions(templates, os.listdir(templates), made / _TEMPLATES)


def _refused(location: ModelLocation, error: Exception) -> ModelError:
    return ModelError(
        f"{location.name}: its weights cannot be dequantised: {reason_of(error)} Fetch the model "
        "again, or give the full-precision model."
    )


def _class(config: Mapping[str, Any]) -> Any:
    """The class of transformers that a config names, or the one for models that write text."""
    import transformers

    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    if isinstance(first, str) and first.endswith(_ARCHITECTURES) and first.isidentifier():
        return getattr(transformers, first, transformers.AutoModelForCausalLM)
    return transformers.AutoModelForCausalLM


def _parameters(location: ModelLocation, config: Mapping[str, Any]) -> int:
    """How many parameters the model of a config has, each that is shared counted once."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        # What it has to say of the config is said to whoever loads the result.
        with quiet_transformers(), torch.device("meta"):
            settings, kind = AutoConfig.for_model(**full_precision(config)), _class(config)
            auto = kind is AutoModelForCausalLM
            model = kind.from_config(settings) if auto else kind(settings)
    except Exception as error:
        raise _refused(location, error) from error
    return sum(parameter.numel() for parameter in model.parameters())


def _require_room(location: ModelLocation, nbytes: int, *, in_memory: bool) -> None:
    """OutputError and ResourceError where disk or memory do not hold so many bytes of weights."""
    free = free_space(models_directory())
    if free < nbytes:
        raise OutputError(
            f"{models_directory()}: the dequantised weights of {location.name} take "
            f"{nbytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free. Free some, or set SPP_CACHE "
            "to a directory on another disk."
        )
    held, there = int(nbytes * _READING_SHARE), free_memory()
    if in_memory and there < held:
        raise ResourceError(
            f"{location.name}: dequantising takes {held / 1e9:.1f} GB of memory, and "
            f"{there / 1e9:.1f} GB are free. Use a larger machine, or the full-precision model."
        )


def _kept_files(directory: Path) -> list[str]:
    """Names of what travels beside the weights."""
    left_out = ("config.json", INDEX_NAME, DEQUANTISED_NAME)
    return [
        path.name
        for path in sorted(directory.iterdir())
        if (path.name.endswith(_KEPT_SUFFIXES) or path.name.startswith(_KEPT_STEMS))
        and path.name not in left_out
        and path.is_file()
    ]


def _key(
    config: Mapping[str, Any],
    directory: Path,
    kept: list[str],
    stored: Mapping[str, StoredTensor],
) -> str:
    """What a checkpoint is told by without reading its weights: config, and size and time of its
    files."""
    files = {directory / name for name in kept} | {tensor.file for tensor in stored.values()}
    facts = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    text = json.dumps([_VERSION, config, facts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _seal(folder: Path, name: str, method: str, bits: int) -> None:
    """Flush every file, and record what they are and their sizes, so that damage is noticed."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in files:
        sync(path)
    record = {
        "version": _VERSION,
        "name": name,
        "method": method,
        "bits": bits,
        "files": {path.relative_to(folder).as_posix(): path.stat().st_size for path in files},
    }
    (folder / DEQUANTISED_NAME).write_text(dump_json(record), encoding="utf-8")
    sync(folder / DEQUANTISED_NAME)


def _is_whole(folder: Path) -> bool:
    record = dequantised_record(folder)
    if record is None or record.get("version") != _VERSION:
        return False
    try:
        return all((folder / name).stat().st_size == n for name, n in record["files"].items())
    except OSError:
        return False


def _dtype_name(config: Mapping[str, Any]) -> str:
    text = config.get("text_config")
    for place in (config, text if isinstance(text, Mapping) else {}):
        for key in ("dtype", "torch_dtype"):
            if place.get(key) in FLOAT_DTYPES.values():
                return str(place[key])
    return "float32"


def _most_values(config: Mapping[str, Any], tensor: StoredTensor) -> int:
    """How many weights a stored tensor may stand for."""
    elements = math.prod(tensor.shape)
    if tensor.dtype in ("U8", "I8"):
        return elements * _VALUES_PER_BYTE
    packed = tensor.dtype in ("I16", "U16", "I32", "U32", "I64", "U64")
    return tensor.nbytes * 8 // bits_of(config) if packed else elements


def _check_layers(
    location: ModelLocation, config: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> None:
    """Before a module is made for every layer and expert."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, Mapping) else {}):
        for key, value in place.items():
            counted = "layers" in key or "experts" in key
            if counted and type(value) is int and value > _MOST_PER_TENSOR * len(stored):
                raise ModelError(
                    f"{location.name}: config.json has {key} {value}, and the files hold only "
                    f"{len(stored)} tensors. Config and weights are of different models."
                )


def _check_scales(
    location: ModelLocation,
    config: Mapping[str, Any],
    method: str,
    stored: Mapping[str, StoredTensor],
) -> None:
    """Every weight that has scales to be multiplied by has them: transformers reads one without as
    it is. Of FP8 their number is right, too, for it takes the size of blocks from it."""
    settings = settings_of(config)
    groups = settings.get("config_groups")
    if method == "compressed-tensors" and isinstance(groups, Mapping) and len(groups) > 1:
        raise ModelError(
            f"{location.name}: quantization_config has {len(groups)} ways of quantising, and "
            "transformers dequantises by one. Give the full-precision model."
        )
    by_blocks = method in ("fp8", "mxfp8")
    block = settings.get("weight_block_size", _DEFAULT_BLOCK) if by_blocks else None
    pair = isinstance(block, list) and [type(size) for size in block] == [int, int]
    if block is not None and not (pair and min(block) > 0):
        raise ModelError(
            f"{location.name}: weight_block_size must be two sizes above 0 or null, got "
            f"{shown(block)}. Correct config.json."
        )
    for tensor in stored.values():
        if tensor.dtype not in _SCALED.get(method, ()):
            continue
        stem = tensor.name.removesuffix("weight")
        names = [f"{tensor.name}_scale"]
        if by_blocks:
            names = [f"{tensor.name}_scale_inv", f"{stem}scale", f"{stem}qscale_weight"]
        scale = next((stored[name] for name in names if name in stored), None)
        label = f"{location.name}: tensor {show(tensor.name)} in {tensor.dtype}"
        if scale is None:
            raise ModelError(f"{label} has no scales {show(names[0])}. Fetch the model again.")
        if by_blocks:
            _check_grid(label, tensor, scale, block)


def _check_grid(
    label: str, tensor: StoredTensor, scale: StoredTensor, block: Sequence[int] | None
) -> None:
    """One scale for each block of a weight [..., rows, columns], or for each matrix without."""
    experts, (rows, columns) = tensor.shape[:-2], (1, *tensor.shape)[-2:]
    if block is None and math.prod(scale.shape) == math.prod(experts):
        return
    height, width = block or (rows, columns)
    if not (height and width) or rows % height or columns % width:
        raise ModelError(
            f"{label} has shape {list(tensor.shape)}, which blocks of {[height, width]} do not "
            "divide, and transformers dequantises whole blocks alone. Give the full-precision "
            "model."
        )
    grid = (*experts, rows // height, columns // width)
    if scale.shape != grid:
        raise ModelError(
            f"{label} has scales of shape {list(scale.shape)}, expected {list(grid)} from "
            "weight_block_size. Config and weights are of different models."
        )

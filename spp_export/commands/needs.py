"""The disk space and memory that each command needs to write a model."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spp_export.common.disk import free_space, nearest
from spp_export.common.errors import ModelError, OutputError, ResourceError
from spp_export.common.memory import free_memory
from spp_export.formats.format import FormatOptions, ModelFiles
from spp_export.formats.registry import format_of
from spp_export.formats.safetensors.format import SafetensorsOptions
from spp_export.models.checkpoint.checkpoint import TOKENIZER_FILES, Checkpoint
from spp_export.models.checkpoint.companions import companion
from spp_export.models.checkpoint.dtypes import ELEMENT_BYTES, FLOAT_DTYPES
from spp_export.models.session import Session
from spp_export.models.shape import ModelShape, Units, resident_parameters, unit_parameters

_ELEMENT_BYTES = {name: ELEMENT_BYTES[stored] for stored, name in FLOAT_DTYPES.items()}
# What an interpreter with torch takes, and what is computed with the weights.
_PROGRAM_MEMORY = 700_000_000
# Code, plan, report, card and manifest.
_SMALL_FILES = 1_000_000


def export_needs(
    session: Session,
    target: Path,
    slim_bytes: int,
    *,
    runs_model: bool,
    verify: bool,
    form: FormatOptions,
) -> Needs:
    """What it takes to write a slim checkpoint of so many bytes and, from it, another format.

    runs_model: the dense model is asked about text, before it is sliced.
    """
    source, shape = session.source, session.source.shape
    size = _ELEMENT_BYTES[session.dtype]
    slim, dense = slim_bytes // shape.element_bytes, shape.parameters(shape.layers)
    disk = {"slim checkpoint": slim_bytes, "other files": _other_files(source.path)}
    disk |= format_of(form).disk(form, source.dtype, slim, verify)
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
    target: Path, checkpoint: Checkpoint, form: FormatOptions, files: ModelFiles, verify: bool
) -> Needs:
    """Of writing a checkpoint, whose tensors pass through memory one at a time, as `files`; where
    they are checked, the engine and PyTorch have the model in memory."""
    made = format_of(form)
    parameters = checkpoint.shape.parameters(checkpoint.layers)
    parts = made.disk(form, checkpoint.dtype, parameters, verify)
    largest = max(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    least = made.working_bytes(form) * largest
    memory = _base(least)
    if verify:
        model = _ELEMENT_BYTES[files.torch_dtype] * parameters
        memory |= {f"model in {files.torch_dtype}": model, **parts}
    return Needs(target, {**parts, "other files": _other_files(checkpoint.path)}, memory, least)


def probe_needs(session: Session, target: Path, domains: int) -> Needs:
    """What the offline stage takes: it writes little and runs the dense model."""
    shape = session.source.shape
    units = shape.hidden_size + shape.query_heads + shape.channels
    form = SafetensorsOptions()
    needs = export_needs(session, target, 0, runs_model=True, verify=False, form=form)
    return replace(needs, disk={"artifacts": 4 * domains * shape.num_layers * units})


def _base(largest: int) -> dict[str, int]:
    return {"program": _PROGRAM_MEMORY, "largest tensor, twice": 2 * largest}


def _other_files(directory: Path) -> int:
    """Bytes of what travels beside the weights."""
    paths = (companion(directory, name) for name in TOKENIZER_FILES)
    return _SMALL_FILES + sum(path.stat().st_size for path in paths if path)


_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Needs:
    """Bytes that a command needs, by purpose.

    disk          on the file system of `target`, all at once
    memory        of the machine, where everything is held that is worth holding
    least_memory  of weights alone, without which it cannot be done
    from_disk     weights stay on disk and are read layer by layer
    """

    target: Path
    disk: Mapping[str, int]
    memory: Mapping[str, int]
    least_memory: int
    from_disk: bool = False

    def to_dict(self) -> dict[str, Any]:
        """For `--json`, beside what is free."""
        return {
            "disk": {"bytes": dict(self.disk), "free": free_space(self.target)},
            "memory": {
                "bytes": dict(self.memory),
                "least": self.least_memory,
                "free": _memory(),
            },
        }


def check_disk(needs: Needs) -> None:
    """OutputError where the disk is too small."""
    total, free = sum(needs.disk.values()), free_space(needs.target)
    if free < total:
        raise OutputError(
            f"{needs.target}: needs {_size(total)} ({_listed(needs.disk)}), {_size(free)} are "
            "free. Make room or choose another -o."
        )


def check_memory(needs: Needs) -> None:
    """Refuse what cannot succeed, and warn of what will be slow.

    Raises ResourceError where memory and swap together have less than the least that is needed.
    """
    held, free = sum(needs.memory.values()), _memory()
    if free < needs.least_memory:
        raise ResourceError(
            f"memory: needs at least {_size(needs.least_memory)}, {_size(free)} are free, swap "
            "included. Close other programs, or use a larger machine."
        )
    if free < held:
        _log.warning(
            "memory: all at once takes %s (%s), %s are free, swap included; %s.",
            _size(held),
            _listed(needs.memory),
            _size(free),
            "models run layer by layer from disk" if needs.from_disk else "it will be slow",
        )


def check_place(target: Path) -> None:
    """OutputError if nothing can be created beside `target`; called before any work."""
    place = nearest(target.parent)
    if not place.is_dir():
        raise OutputError(f"{target}: {place} is not a directory. Choose another -o.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise OutputError(f"{target}: {place} cannot be written. Choose another -o.")


def check_readable(directory: Path, names: Iterable[str]) -> None:
    """ModelError for a file of a model that exists and cannot be opened.

    Of weights, headers and sizes have been read by whoever opened the model.
    """
    for name in names:
        try:
            if path := companion(directory, name):
                path.open("rb").close()
        except OSError as error:
            raise ModelError(
                f"{directory / name}: cannot be read ({error.strerror}). Correct its permissions."
            ) from error


def least_slim_bytes(shape: ModelShape, keep: float | None, units: Units) -> int:
    """About the fewest bytes of tensors under this budget, before there is a plan.

    `keep` None, a budget of another kind, may take any of the units.
    """
    removable = unit_parameters(shape, shape.layers, units)
    # Rounding to whole groups and widths can end below the budget.
    stays = 0.9 * (keep or 0.0)
    return round(shape.element_bytes * (shape.parameters(shape.layers) - (1 - stays) * removable))


def _memory() -> int:
    import psutil

    swap: int = psutil.swap_memory().free
    return free_memory() + swap


def _size(count: float) -> str:
    for unit in ("kB", "MB"):
        count /= 1000
        if count < 999.95:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} GB"


def _listed(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {_size(count)}" for name, count in parts.items() if count)

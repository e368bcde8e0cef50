"""One model as a command uses it: its files, and its weights once they are needed."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spp_export.common.errors import ModelError, UsageError
from spp_export.common.memory import free_memory
from spp_export.common.options import MatmulName
from spp_export.common.processes import answering, count, local_place
from spp_export.common.progress import progress
from spp_export.models.checkpoint.checkpoint import Checkpoint, open_source
from spp_export.models.checkpoint.reader import require_unchanged
from spp_export.models.dequantise import find_model
from spp_export.models.devices import own_device, require_device
from spp_export.models.helpers import Helpers, help_with
from spp_export.models.hub import DEMO
from spp_export.models.products import Matmul, multiplies_bfloat16
from spp_export.models.tokenizer import ModelTokenizer, load_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import nn

# Of the free memory, what weights may take; activations and logits need some as well.
_MEMORY_SHARE = 0.8
# What `helped_session` opened last, and how.
_HELPED: dict[str, Any] = {}
_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass
class Session:
    """A source model; the dense weights and the tokenizer are loaded on first use.

    layerwise: run models layer by layer, their weights staying on disk; None decides by the memory
    that is free.
    parallel: how ranks share the model: "data", "tensor" or "map", as of `open_session`.
    opening: arguments of `open_session` as they were given, by which other ranks open it too.
    matmul: of the products taken while text is read for statistics
    remembered: what was read off the model and may be asked for again, by what decided it.
    """

    source: Checkpoint
    device: str
    dtype: str
    layerwise: bool | None = False
    parallel: str = "data"
    opening: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    matmul: Matmul = "float32"
    remembered: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def model(self) -> nn.Module:
        """The dense causal LM, in evaluation mode."""
        from spp_export.models.loader import load_dense

        if self.from_disk:
            model = self._open_layerwise(self.source.path)
        else:
            with progress("loading the dense model", None):
                model = load_dense(self.source.path, dtype=self.torch_dtype, device=self.device)
        require_unchanged(self.source.tensors.values())
        return model

    @cached_property
    def reader(self) -> nn.Module:
        """The dense model that reads calibration text, together with other ranks where there are
        some: `model` itself, but where ranks have a part of it each."""
        from spp_export.models.loader import load_parts

        if not self.opening:
            return self.model
        helpers = Helpers(self._opening(), self.parallel == "tensor")
        if self.parallel == "tensor":
            self._check_parts()
            helpers.ask(_load_part)
            with progress("loading the dense model in parts", None):
                model: nn.Module = load_parts(self.source.path, self.torch_dtype)
            require_unchanged(self.source.tensors.values())
        else:
            model = self.model
        help_with(model, helpers)
        return model

    def _check_parts(self) -> None:
        """UsageError where a layer does not fall into equal parts."""
        shape, ranks = self.source.shape, count()
        counts = {"KV heads": shape.kv_heads, "query heads": shape.query_heads}
        for name, number in (counts | {"MLP channels": shape.channels}).items():
            if number % ranks:
                raise UsageError(
                    f"--parallel tensor: {ranks} processes cannot share the model's {number} "
                    f"{name} evenly. Start as many as divide it, or use --parallel map."
                )

    def _opening(self) -> dict[str, Any]:
        """How another rank opens this model."""
        return {
            **self.opening,
            "dtype": self.dtype,
            "layerwise": self.reads_from_disk,
            "fingerprint": self.source.fingerprint,
        }

    def slim_model(self, directory: Path) -> nn.Module:
        """A slim checkpoint of this model, to run beside it."""
        from spp_export.models.loader import load_slim

        if self.from_disk:
            return self._open_layerwise(directory)
        return load_slim(directory, dtype=self.torch_dtype, device=self.device)

    @cached_property
    def from_disk(self) -> bool:
        """Whether models run layer by layer: where the dense and the slim one do not fit in memory
        together, unless it was said, and what ranks have only parts of. `device` "auto" spreads
        them by itself."""
        if self.parallel == "tensor":
            return True
        if self.layerwise is not None or self.device == "auto":
            return bool(self.layerwise)
        shape = self.source.shape
        both = 2 * self.torch_dtype.itemsize * shape.parameters(shape.layers)
        return both > _MEMORY_SHARE * free_memory(self.device)

    @property
    def reads_from_disk(self) -> bool:
        """The same of `reader`."""
        return self.parallel != "tensor" and self.from_disk

    def _open_layerwise(self, directory: Path) -> nn.Module:
        from spp_export.models.layerwise import open_layerwise

        return open_layerwise(directory, self.torch_dtype, self.device)

    @cached_property
    def tokenizer(self) -> ModelTokenizer:
        """The model's own tokenizer."""
        return load_tokenizer(self.source.path, name=self.source.name)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of every computation with this model."""
        import torch

        result: torch.dtype = getattr(torch, self.dtype)
        return result


def open_session(
    model: str = DEMO,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    layerwise: bool | None = False,
    dequantize: bool = False,
    parallel: str = "data",
    matmul: MatmulName = "float32",
) -> Session:
    """Find a model and read its config and headers; no weights yet.

    `dtype` defaults to float32 on the CPU, whose results every check can rely on, and to the
    stored dtype elsewhere. `layerwise` is as in `Session`, `dequantize` as in `find_model`.
    `matmul` "auto" is bfloat16 where the device has it and the model runs in float32.

    Where there are several ranks, each holds the whole model (`parallel` "data"), all of them on
    one machine a part each ("tensor"), or each spreads it over its cards ("map", device "auto").
    """
    if parallel == "map":
        device = "auto"
    if parallel == "tensor" and not 1 < count() == local_place()[1]:
        raise UsageError(
            "--parallel tensor: the parts of a model are on the processes of one machine. Start "
            "spp with torchrun --nproc-per-node, one for each card; over several machines use "
            "--parallel map."
        )
    if parallel == "tensor" and (layerwise or device == "auto"):
        raise UsageError(
            "--parallel tensor holds the model in parts, one on each card. Drop --layerwise and "
            "--device auto."
        )
    if layerwise and device == "auto":
        raise UsageError(
            "--layerwise runs on one device, and --device auto spreads the model over several. "
            "Give one of the two."
        )
    opening = {
        "model": model,
        "dequantize": dequantize,
        "device": device,
        "parallel": parallel,
    }
    device = own_device(device)
    require_device(device)
    location = find_model(model, dequantize=dequantize)
    source = open_source(location.path, location.name)
    if dtype is None:
        dtype = "float32" if device == "cpu" else source.dtype_name
    if dtype not in _DTYPES:
        raise UsageError(f"--dtype {dtype}: expected one of {', '.join(_DTYPES)}.")
    if matmul == "auto":
        fast = dtype == "float32" and multiplies_bfloat16(device)
        matmul = "bfloat16" if fast else "float32"
    elif matmul == "bfloat16" and dtype != "float32":
        raise UsageError(
            f"--matmul bfloat16: of a model that runs in float32, and this one runs in {dtype}. "
            "Drop one of --matmul and --dtype."
        )
    return Session(source, device, dtype, layerwise, parallel, opening, matmul)


@answering
def _load_part(opening: Mapping[str, Any]) -> None:
    _ = helped_session(opening).reader


def helped_session(opening: Mapping[str, Any]) -> Session:
    """The model that rank 0 reads a text with, on another rank; opened once, and the one before it
    given up. Raises ModelError where the name stands for another model here."""
    if _HELPED.get("opening") != opening:
        _HELPED.clear()
        how = dict(opening)
        fingerprint = how.pop("fingerprint")
        session = open_session(how.pop("model"), **how)
        if session.source.fingerprint != fingerprint:
            raise ModelError(
                f"{opening['model']}: is another model here than on rank 0. Give every machine the "
                "same files."
            )
        _HELPED.update(opening=opening, session=session)
    helped: Session = _HELPED["session"]
    return helped

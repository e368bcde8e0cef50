"""Slim and dense checkpoints on disk to models that run. Remote code is never executed.

transformers follows whatever an index, a config or a link in the directory names, so all of these
are checked before it sees the directory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

import spp_export.models.modeling  # noqa: F401  registers the per-layer classes
from spp_export.common import processes
from spp_export.common.errors import CheckpointError, UsageError, reason_of
from spp_export.common.progress import quiet_transformers
from spp_export.models.checkpoint.checkpoint import Checkpoint, open_checkpoint, open_source
from spp_export.models.checkpoint.companions import check_companions
from spp_export.models.devices import own_cards
from spp_export.models.families import Family


def load_slim(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """A slim checkpoint of any layout as a transformers model in evaluation mode.

    `dtype` None keeps the stored one. `device` "auto" spreads the layers over what there is.
    Per-layer and ragged checkpoints run on the classes of this package, not on the files beside
    the weights. `attn_implementation` is one of transformers', or `spp_ragged`: the kernels of
    spp_kernels, which read the cache as it is where others copy it for every query head.

    Raises ModelError where the directory holds no such model, CheckpointError where its tensors are
    not exactly those of its config.
    """
    return _load(open_checkpoint(Path(path)), dtype, device, attn_implementation)


def load_dense(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """A source model from its directory; parameters and errors as in `load_slim`."""
    return _load(open_source(Path(path)), dtype, device, attn_implementation)


def auto_class(family: Family) -> Any:
    """Transformers' own, which loads models of a family."""
    return AutoModelForImageTextToText if family.inside else AutoModelForCausalLM


def load_parts(path: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """A source model of which each rank has a part, by transformers' own plan; all of them call
    this at once. Parameters and errors as in `load_slim`, UsageError where transformers has no
    plan."""
    opened = open_source(Path(path))
    config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    plan = getattr(config, "base_model_tp_plan", None)
    if transformers.__version__.startswith("4."):
        raise UsageError(
            f"--parallel tensor needs transformers 5 or newer, and {transformers.__version__} is "
            "installed. Install a newer one, or use --parallel map."
        )
    if not plan:
        raise UsageError(
            f"--parallel tensor: transformers {transformers.__version__} has no plan for the parts "
            f"of a {config.model_type} model. Use --parallel map."
        )
    known = getattr(getattr(transformers, "distributed", None), "DistributedConfig", None)
    if known is not None and "tp_plan" in getattr(known, "__dataclass_fields__", {}):
        how = known(tp_size=processes.count(), tp_plan="auto")
        return _load(opened, dtype, "cpu", None, distributed_config=how)
    return _load(opened, dtype, "cpu", None, tp_plan="auto")


def _load(
    opened: Checkpoint,
    dtype: torch.dtype | str | None,
    device: str | torch.device,
    attn_implementation: str | None,
    **options: Any,
) -> PreTrainedModel:
    path = opened.path
    check_companions(path)
    options["dtype"] = "auto" if dtype is None else dtype
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if opened.family.experts and hasattr(PreTrainedModel, "set_experts_implementation"):
        half = dtype in ("bfloat16", "float16", torch.bfloat16, torch.float16)
        if str(device) == "cpu" or not half:
            # transformers' own choice computes in half precision and float32 alone, and a model is
            # widened to float64 where it is judged.
            options["experts_implementation"] = "eager"
    if str(device) != "cpu":
        options["device_map"] = "auto" if device == "auto" else {"": torch.device(device)}
    if device == "auto" and (cards := own_cards()):
        options["max_memory"] = cards
    try:
        with quiet_transformers():
            loaded: Any = auto_class(opened.family).from_pretrained(
                path,
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                # Mismatches come back in the report, where the tensor has a name.
                ignore_mismatched_sizes=True,
                **options,
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a damaged checkpoint can fail anywhere below
        raise CheckpointError(f"{path}: cannot be loaded: {reason_of(error)}") from error
    model, report = loaded
    _check_report(path, report)
    assert isinstance(model, PreTrainedModel)
    if str(device) == "cpu":
        _copy_from_files(model)
    return model


def _copy_from_files(model: PreTrainedModel) -> None:
    """Take the weights out of the mapped files, where others may write, or cut them off, which
    would end this process by a signal."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def _check_report(path: str | Path, report: Mapping[str, Iterable[Any]]) -> None:
    """Refuse what transformers only warns of: tensors it made up, and tensors it left out."""
    # transformers 5 gives (name, stored shape, wanted shape) for a mismatch, 4.57 the name alone
    mismatched = [item if isinstance(item, str) else item[0] for item in report["mismatched_keys"]]
    for names, complaint in (
        (mismatched, "has another shape than its config.json gives it"),
        (list(report["missing_keys"]), "is missing"),
        (list(report["unexpected_keys"]), "does not belong to the model of its config.json"),
    ):
        if names:
            others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise CheckpointError(
                f"{path}: tensor {min(names)}{others} {complaint}. The checkpoint is damaged."
            )

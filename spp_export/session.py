"""One model as a command uses it: its files, and its weights once something needs them."""

from __future__ import annotations

import os
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spp_export.artifacts import Artifacts, check_model, read_artifacts
from spp_export.checkpoint.source import Source, open_source
from spp_export.errors import ModelError, UsageError
from spp_export.models import DEMO, locate_model
from spp_export.progress import Progress, no_progress

if TYPE_CHECKING:
    import torch
    from torch import nn

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


@dataclass
class Session:
    """A source model; the dense weights and the tokenizer are loaded on first use.

    remembered: what was read off the model and may be asked for again, by what decided it.
    """

    source: Source
    device: str
    dtype: str
    progress: Progress
    remembered: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def model(self) -> nn.Module:
        """The dense causal LM, in evaluation mode."""
        from spp_export.loader import load_dense

        with self.progress("loading the dense model", None):
            return load_dense(self.source.path, dtype=self.torch_dtype, device=self.device)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's own tokenizer."""
        from transformers import AutoTokenizer

        # What transformers says of such a directory depends on its version.
        if not any((self.source.path / name).exists() for name in _TOKENIZER_FILES):
            raise ModelError(
                f"{self.source.name}: no tokenizer that transformers can load: expected one of "
                f"{', '.join(_TOKENIZER_FILES)} beside config.json."
            )
        try:
            return AutoTokenizer.from_pretrained(self.source.path)
        except (OSError, ValueError, KeyError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(
                f"{self.source.name}: no tokenizer that transformers can load: {first}"
            ) from error

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
    progress: Progress = no_progress,
) -> Session:
    """Find a model and read its config and headers; no weights yet.

    `dtype` defaults to float32 on the CPU, whose results every check can rely on, and to the
    stored dtype elsewhere.
    """
    location = locate_model(model, progress=progress)
    source = open_source(location.path, location.name)
    if dtype is None:
        dtype = "float32" if device == "cpu" else source.dtype_name
    if dtype not in _DTYPES:
        raise UsageError(f"--dtype {dtype}: expected one of {', '.join(_DTYPES)}.")
    return Session(source, device, dtype, progress)


def bundled_artifacts() -> Path:
    """The demo model's artifacts, shipped in the package."""
    return Path(__file__).parent / "assets" / "smollm2-135m-instruct"


def open_artifacts(
    artifacts: str | os.PathLike[str] | None, model: str, source: Source
) -> Artifacts:
    """Artifacts for a model: the given directory, or the shipped ones for the demo model."""
    if artifacts is None and model != DEMO:
        raise UsageError(
            "--artifacts is missing: only the demo model's ship with spp. "
            f"Make them once with 'spp probe --model {model} --pools DIR -o ARTIFACTS'."
        )
    found = read_artifacts(Path(artifacts) if artifacts is not None else bundled_artifacts())
    check_model(found, source.fingerprint, source.shape)
    return found

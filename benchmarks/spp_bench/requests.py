"""What requests for measurements have in common: options that make no sense are refused alike."""

from __future__ import annotations

from collections.abc import Mapping

from spp_export.common.errors import UsageError

DTYPES = ("float32", "bfloat16", "float16", "float64")


def check_counts(counts: Mapping[str, int | None]) -> None:
    """UsageError for an option below 1; None is one that was not given."""
    for option, value in counts.items():
        if value is not None and value < 1:
            raise UsageError(f"{option} {value}: expected 1 or more.")


def check_device(device: str, dtype: str | None) -> None:
    """UsageError for what is no device or precision, and for a card that is not there."""
    if device != "cpu" and not device.startswith("cuda"):
        raise UsageError(f"--device {device}: expected cpu, cuda or cuda:N.")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}.")
    if device != "cpu":
        import torch

        if not torch.cuda.is_available():
            raise UsageError(
                f"--device {device}: PyTorch finds no CUDA card here. Use --device cpu."
            )

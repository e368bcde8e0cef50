"""Devices by their names, and whether they are there."""

from __future__ import annotations

from spp_export.common.errors import UsageError
from spp_export.common.options import check_device_name


def require_device(device: str) -> None:
    """UsageError where PyTorch cannot run a model on a device of this name."""
    check_device_name(device)
    kind, _, index = device.partition(":")
    if kind in ("cpu", "auto"):
        return
    import torch

    if kind == "mps":
        count = int(torch.backends.mps.is_available())
    else:
        count = getattr(torch, kind).device_count()
    if not count:
        what = {"cuda": "CUDA card", "mps": "Apple GPU", "xpu": "Intel GPU"}[kind]
        raise UsageError(f"--device {device}: PyTorch sees no {what} here. Use --device cpu.")
    if int(index or 0) >= count:
        raise UsageError(
            f"--device {device}: PyTorch sees {count} here, {kind}:0 to {kind}:{count - 1}."
        )

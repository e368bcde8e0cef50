"""Devices by their names, and whether they are there."""

from __future__ import annotations

from spp_export.common.errors import UsageError
from spp_export.common.memory import free_memory
from spp_export.common.options import check_device_name
from spp_export.common.processes import local_place


def own_device(device: str) -> str:
    """The device of this process: where several of a machine run on cards, each has one of its own.

    Raises UsageError for a card by its number, which only one of them could have.
    """
    place, several = local_place()
    kind, _, index = device.partition(":")
    if several == 1 or kind not in ("cuda", "xpu"):
        return device
    if index and int(index) != place:
        raise UsageError(
            f"--device {device}: each of the {several} processes of this machine takes a card of "
            f"its own. Use --device {kind}."
        )
    return f"{kind}:{place}"


def own_cards() -> dict[int | str, int] | None:
    """Of the machine's cards those of this process, with the bytes that are free on each, and the
    machine's memory, for a model that is spread over them; None for all of them.

    Raises UsageError where there are more processes than cards.
    """
    place, several = local_place()
    import torch

    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if several == 1 or not cards:
        return None
    if cards < several:
        raise UsageError(
            f"--device auto: {several} processes share the {cards} cards of this machine, each at "
            "least one. Start fewer."
        )
    own = range(cards)[place::several]
    free: dict[int | str, int] = {card: free_memory(f"cuda:{card}") for card in own}
    return free | {"cpu": free_memory()}


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

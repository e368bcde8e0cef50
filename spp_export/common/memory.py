"""How much memory is free where a model is to live."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from spp_export.common.processes import local_place

_GROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def free_memory(device: str = "cpu") -> int:
    """Bytes free on an accelerator, or else of the machine's memory; where the process is in a
    control group with a limit, as in a container, what that leaves; of a machine that several
    processes of one command run on, each one's part."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    import psutil

    available: int = psutil.virtual_memory().available
    return min([available, *_left_by_groups()]) // local_place()[1]


def _left_by_groups() -> Iterator[int]:
    try:
        lines = _MEMBERSHIP.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        names = ("memory.max", "memory.current", "inactive_file", "active_file")
        root = _GROUPS
        if controllers == "memory":  # version 1
            names = (
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
                "total_active_file",
            )
            root = _GROUPS / "memory"
        elif controllers:
            continue
        here = root / group.lstrip("/")
        # In a container the group's own path is often not to be seen, and its files are the root's.
        for directory in (here, *here.parents):
            if directory == root.parent:
                break
            left = _left(directory, *names)
            if left is not None:
                yield left


def _left(directory: Path, limit: str, usage: str, *reclaimable: str) -> int | None:
    """The limit less what is used and cannot be taken back; None without a limit."""
    try:
        most = int((directory / limit).read_text())
        used = int((directory / usage).read_text())
        rows = (line.split() for line in (directory / "memory.stat").read_text().splitlines())
        cached = sum(int(value) for name, value in rows if name in reclaimable)
    except (OSError, ValueError):  # no such file, or "max"
        return None
    return max(most - max(used - cached, 0), 0)

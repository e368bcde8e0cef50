"""What every measurement states beside its numbers: the machine and the versions."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from spp_export.versions import library_versions


def machine() -> dict[str, Any]:
    """Processor, cores and library versions."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {"cpu": cpu, "cores": os.cpu_count(), **library_versions()}

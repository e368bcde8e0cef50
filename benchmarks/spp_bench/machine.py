"""What every measurement states beside its numbers: the machine and the versions."""

from __future__ import annotations

import os
from typing import Any

from spp_export.evaluation.machine import cpu_name
from spp_export.versions import library_versions


def machine() -> dict[str, Any]:
    """Processor, cores and library versions."""
    return {"cpu": cpu_name(), "cores": os.cpu_count(), **library_versions()}

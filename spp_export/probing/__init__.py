"""The offline stage: domain axes, probes, temperatures, importance, whitelist. One file each."""

from __future__ import annotations

from spp_export.probing.scores import DEFAULT_CRITERIA
from spp_export.probing.stage import ProbeRequest, probe_model

__all__ = ["DEFAULT_CRITERIA", "ProbeRequest", "probe_model"]

"""The offline stage: domain axes, probes, temperatures, importance, whitelist. One file each."""

from __future__ import annotations

from spp_export.domains.probe_model import ProbeRequest, probe_model
from spp_export.domains.scores import DEFAULT_CRITERIA

__all__ = ["DEFAULT_CRITERIA", "ProbeRequest", "probe_model"]

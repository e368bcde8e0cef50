"""The result of an export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spp_export.calibration.stored import Kept
from spp_export.commands.needs import Needs
from spp_export.commands.push import PushResult
from spp_export.domains.diagnosis import Diagnosis
from spp_export.formats.registry import FORMATS
from spp_export.models.engines import Engine
from spp_export.models.shape import ModelShape
from spp_export.planning import Plan
from spp_export.planning.bound import Predicted


@dataclass(frozen=True)
class ExportResult:
    """An export's plan, files and report of checks.

    path    None for a dry run
    form    what the files say of their format
    nbytes  of the files made from the slim checkpoint; 0 where they are its own
    kept    what was left in the cache for later runs
    """

    path: Path | None
    plan: Plan
    shape: ModelShape
    diagnosis: Diagnosis | None
    predicted: Predicted
    engines: tuple[Engine, ...]
    tensors: Sequence[Mapping[str, Any]]
    report: Mapping[str, Any] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    format: str = "safetensors"
    form: Mapping[str, Any] = field(default_factory=dict)
    nbytes: int = 0
    needs: Needs | None = None
    pushed: PushResult | None = None
    kept: Kept = field(default_factory=Kept)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        kept = [len(layer.query_heads) for layer in self.plan.layers]
        return {
            "path": None if self.path is None else str(self.path),
            "format": self.format,
            **{
                name: {**self.form, "bytes": self.nbytes} if name == self.format else None
                for name, made in FORMATS.items()
                if made.converted
            },
            "layout": self.plan.layout,
            "padded": self.plan.padded,
            "compensation": self.plan.compensation,
            "scenario": dict(self.plan.scenario),
            "diagnosis": self.diagnosis.to_dict() if self.diagnosis else None,
            "kept_query_heads": kept,
            "kept_kv_heads": [len(layer.kv_heads) for layer in self.plan.layers],
            "kept_channels": [layer.channels for layer in self.plan.layer_shapes(self.shape)],
            "kept_expert_channels": [layer.expert_width for layer in self.plan.layers],
            "kept_experts": list(self.shape.experts_in(self.plan.layer_shapes(self.shape))),
            "dense_heads": {"query": self.shape.query_heads, "kv": self.shape.kv_heads},
            "dense_channels": self.shape.channels,
            "budget": dict(self.plan.budget),
            "predicted": self.predicted.to_dict(),
            "verify": self.report,
            "engines": [engine.to_dict() for engine in self.engines],
            "tensors": [dict(tensor) for tensor in self.tensors] if self.path is None else None,
            "needs": self.needs.to_dict() if self.needs and self.path is None else None,
            "pushed": self.pushed.to_dict() if self.pushed else None,
            "cached": self.kept.to_dict(),
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
        }

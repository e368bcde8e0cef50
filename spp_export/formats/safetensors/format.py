"""safetensors, as the commands know it: the slim checkpoint itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spp_export.formats.format import (
    CardFacts,
    Comparison,
    FileChecks,
    Format,
    FormatOptions,
    Library,
    ModelFiles,
    Promise,
    RunningModel,
)
from spp_export.models.engines import Engine, engines_for
from spp_export.models.families import record_of

if TYPE_CHECKING:
    from spp_export.models.checkpoint.checkpoint import Checkpoint
    from spp_export.models.shape import LayerShape
    from spp_export.planning import Plan


@dataclass(frozen=True)
class SafetensorsOptions(FormatOptions):
    """Nothing to choose: weights stay in the dtype of the source."""


class Safetensors(Format[SafetensorsOptions]):
    """A directory that transformers loads."""

    name = "safetensors"
    title = "safetensors"
    kind = "slim checkpoint"
    engine = "transformers and vLLM"
    options = SafetensorsOptions
    weights = "*.safetensors"
    others = ("*.safetensors.index.json", "*_spp.py")
    reference = "the dense model with the same units masked"
    converted = False
    ragged = True
    libraries = (Library("vllm", "vllm", "a server for many users"),)

    def prepare(
        self, options: SafetensorsOptions, checkpoint: Checkpoint, plan: Plan
    ) -> ModelFiles:
        return SafetensorsFiles(checkpoint, plan)

    def disk(
        self, options: SafetensorsOptions, stored_dtype: str, parameters: int, verify: bool
    ) -> dict[str, int]:
        """Nothing beside the slim checkpoint."""
        return {}

    def verify(self, directory: Path, against: Promise) -> FileChecks:
        from spp_export.formats.safetensors.verify import check_directory

        checked = check_directory(
            directory, against.session, against.plan, against.prompts, against.seed
        )
        return FileChecks(checked.report.checks, checked.report.context, checked.slim)

    def facts(self, directory: Path) -> dict[str, Any]:
        return {}

    def engines_for(
        self, config: Mapping[str, Any], layout: str, layers: Sequence[LayerShape]
    ) -> tuple[Engine, ...]:
        family = record_of(config)
        return engines_for(family.model_type if family else "", layout, layers)

    def describe(self, summary: Mapping[str, Any], size: str) -> list[str]:
        return []

    def run(
        self, directory: Path, *, device: str, dtype: str | None, threads: int | None
    ) -> RunningModel:
        from spp_export.formats.safetensors.run import load_torch

        return load_torch(directory, device, dtype, threads)


class SafetensorsFiles(ModelFiles):
    """The slim checkpoint, which is written and checked before any other format is made of it."""

    summary: Mapping[str, Any] = {}
    nbytes: Mapping[str, int] = {}

    def __init__(self, checkpoint: Checkpoint, plan: Plan) -> None:
        self._plan = plan
        self.engines = engines_for(
            checkpoint.family.model_type,
            checkpoint.layout,
            checkpoint.layers,
        )
        self.element_bytes = checkpoint.shape.element_bytes
        self.torch_dtype = checkpoint.dtype_name

    def write(self, checkpoint: Path, out: Path) -> None:
        assert checkpoint == out

    def check(self, out: Path, against: Comparison) -> FileChecks:
        return FileChecks()

    def card(self, facts: CardFacts) -> str:
        from spp_export.formats.card import model_card

        assert facts.slim
        return model_card(facts.name, *facts.slim, facts.report, self.engines, facts.license_name)

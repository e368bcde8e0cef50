"""What a format is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from spp_export.common.errors import CheckFailed, ParityError
from spp_export.evaluation.batches import slim_reference
from spp_export.formats.decoder import Decoder
from spp_export.models.engines import Engine
from spp_export.models.tokenizer import load_tokenizer
from spp_export.planning import Plan

if TYPE_CHECKING:
    import torch

    from spp_export.calibration.activations import TokenBatch
    from spp_export.evaluation.parity import Check, ReferenceLogits


# verify.json's content, and the error if the answer is no.
Verdict = tuple[dict[str, Any], CheckFailed | None]


@dataclass(frozen=True)
class Job:
    """A checkpoint, what it is, and what it is checked with."""

    checkpoint: Path
    decoder: Decoder
    plan: Plan
    device: str
    seed: int

    @property
    def slim_plan(self) -> Plan | None:
        """The plan of an export; None where the checkpoint is a dense model."""
        return self.plan if (self.checkpoint / "plan.json").exists() else None

    def batches(self, prompts: Sequence[str]) -> Sequence[TokenBatch]:
        """Tokens to compare logits on."""
        from spp_export.evaluation.batches import check_batches

        tokenizer = load_tokenizer(self.checkpoint) if prompts else None
        return check_batches(self.decoder.shape.vocab_size, prompts, tokenizer, self.seed)

    def reference(self, batches: Sequence[TokenBatch], own: torch.dtype) -> ReferenceLogits:
        """Logits of the PyTorch model, exact and in `own`."""
        from spp_export.evaluation.batches import wide_dtype

        parameters = self.decoder.shape.parameters(self.decoder.layers)
        return slim_reference(self.checkpoint, batches, wide_dtype(own, parameters, "cpu"), own)


class Converter(Protocol):
    """One format, for one job."""

    @property
    def files(self) -> tuple[str, ...]:
        """Patterns of the files that hold the model."""

    @property
    def engines(self) -> tuple[Engine, ...]:
        """What loads them."""

    @property
    def form(self) -> Mapping[str, Any]:
        """What to say of the file."""

    def write(self, work: Path) -> None:
        """Everything but plan, card and manifest."""

    def verify(self, work: Path, prompts: Sequence[str]) -> Verdict:
        """What was found of what was written."""

    def card(self, name: str, report: Mapping[str, Any] | None) -> str:
        """README.md."""


def _verdict(checks: tuple[Check, ...], said: Mapping[str, Any]) -> Verdict:
    from spp_export.evaluation.parity import VerifyReport

    report = VerifyReport(checks, said)
    if report.passed:
        return report.to_dict(), None
    first = report.failures[0]
    failure = ParityError(f"{first.name}: {first.describe()} This is a defect of spp.")
    return report.to_dict(), failure

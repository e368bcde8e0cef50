"""How `convert` writes and checks each of its formats."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from spp_export.commands.gguf_files import shown_name

from spp_export.common.errors import CheckFailed, ParityError
from spp_export.common.progress import Progress
from spp_export.formats.card import gguf_card, onnx_card
from spp_export.formats.decoder import Decoder
from spp_export.formats.gguf.contents import gguf_contents
from spp_export.formats.gguf.format import check_gguf_files, write_gguf_files
from spp_export.formats.gguf.options import GGUF_NAME, GgufOptions
from spp_export.formats.gguf.options import require as require_gguf
from spp_export.formats.onnx.format import check_graph_files, slim_reference, write_graph
from spp_export.formats.onnx.options import OnnxOptions, require_all
from spp_export.models.engines import Engine, gguf_engines, onnx_engines
from spp_export.models.hub import model_license
from spp_export.models.tokenizer import load_tokenizer
from spp_export.planning import Plan

if TYPE_CHECKING:
    import torch

    from spp_export.calibration.activations import TokenBatch
    from spp_export.evaluation.parity import Check, ReferenceLogits

ConvertOptions = OnnxOptions | GgufOptions
# verify.json's content, and the error if the answer is no.
Verdict = tuple[dict[str, Any], CheckFailed | None]


def require_for(options: ConvertOptions, device: str | None) -> None:
    """UsageError unless the form can be, and all that it takes is installed.

    `device` None: nothing is going to be checked.
    """
    if isinstance(options, GgufOptions):
        require_gguf()
        options.check()
    else:
        require_all()
        options.check(device)


@dataclass(frozen=True)
class Job:
    """A checkpoint, what it is, and what it is checked with."""

    checkpoint: Path
    decoder: Decoder
    plan: Plan
    device: str
    seed: int
    progress: Progress

    @property
    def slim_plan(self) -> Plan | None:
        """The plan of an export; None where the checkpoint is a dense model."""
        return self.plan if (self.checkpoint / "plan.json").exists() else None

    def batches(self, prompts: Sequence[str]) -> Sequence[TokenBatch]:
        """Tokens to compare logits on."""
        from spp_export.commands.verify import check_batches

        tokenizer = load_tokenizer(self.checkpoint) if prompts else None
        return check_batches(self.decoder.shape.vocab_size, prompts, tokenizer, self.seed)

    def reference(self, batches: Sequence[TokenBatch], own: torch.dtype) -> ReferenceLogits:
        """Logits of the PyTorch model, exact and in `own`."""
        from spp_export.commands.verify import wide_dtype

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


def converter(options: ConvertOptions, job: Job) -> Converter:
    """The converter to a form. Raises ModelError where the format cannot hold the model."""
    if isinstance(options, GgufOptions):
        return _Gguf(options, job)
    return _Onnx(options, job)


class _Onnx:
    files = ("model.onnx*",)

    def __init__(self, options: OnnxOptions, job: Job) -> None:
        self._options, self._job = options, job
        self.engines = onnx_engines(job.decoder.layout, **options.to_dict())
        self.form = options.to_dict()

    def write(self, work: Path) -> None:
        write_graph(self._job.checkpoint, work, self._options, self._job.progress)

    def verify(self, work: Path, prompts: Sequence[str]) -> Verdict:
        import torch

        job = self._job
        own = getattr(torch, self._options.torch_dtype)
        scratch = work / "scratch"
        scratch.mkdir()
        found = check_graph_files(
            work,
            job.checkpoint,
            job.reference(job.batches(prompts), own),
            self._options,
            device=job.device,
            scratch=scratch,
            progress=job.progress,
        )
        shutil.rmtree(scratch)
        said = {"onnx": self._options.to_dict(), **found.quantisation()}
        return _verdict(found.checks, said)

    def card(self, name: str, report: Mapping[str, Any] | None) -> str:
        job = self._job
        base, form = job.plan.model_source, self._options.attention
        license_name = model_license(job.checkpoint)
        return onnx_card(
            name, base, form, report, self.engines, license_name, converted=job.slim_plan
        )


class _Gguf:
    files = (GGUF_NAME,)

    def __init__(self, options: GgufOptions, job: Job) -> None:
        self._job = job
        name = shown_name(job.plan)
        self._contents = gguf_contents(job.decoder, job.checkpoint, options, name)
        self.engines = gguf_engines(self._contents.architecture.name)
        self.form = self._contents.summary()

    def write(self, work: Path) -> None:
        write_gguf_files(self._job.checkpoint, work, self._contents, self._job.progress)

    def verify(self, work: Path, prompts: Sequence[str]) -> Verdict:
        import torch

        job = self._job
        found = check_gguf_files(
            work,
            job.checkpoint,
            self._contents,
            job.batches(prompts),
            lambda batches: job.reference(batches, torch.float32),
            job.progress,
        )
        return _verdict(found.checks, found.context)

    def card(self, name: str, report: Mapping[str, Any] | None) -> str:
        job = self._job
        license_name = model_license(job.checkpoint)
        base = job.plan.model_source
        return gguf_card(
            name, base, self.form, report, self.engines, license_name, converted=job.slim_plan
        )


def _verdict(checks: tuple[Check, ...], said: Mapping[str, Any]) -> Verdict:
    from spp_export.evaluation.parity import VerifyReport

    report = VerifyReport(checks, said)
    if report.passed:
        return report.to_dict(), None
    first = report.failures[0]
    failure = ParityError(f"{first.name}: {first.describe()} This is a defect of spp.")
    return report.to_dict(), failure

"""`convert`: write an existing checkpoint, slim or dense, in another format."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spp_export.calibration.reading import Text
from spp_export.commands.needs import (
    check_disk,
    check_memory,
    check_place,
    check_readable,
    convert_needs,
)
from spp_export.commands.quality import (
    dense_at_hand,
    judged_texts,
    measure_file,
    record_quality,
)
from spp_export.commands.requests import ConvertRequest
from spp_export.common.disk import scratch_folder
from spp_export.common.errors import CheckFailed, ModelError, OutputError, ParityError
from spp_export.common.json_files import dump_json
from spp_export.common.manifest import check_manifest, write_manifest, wrote
from spp_export.common.options import command
from spp_export.common.publish import check_target, publish
from spp_export.data.scenario import Scenario, read_scenario
from spp_export.formats.format import CardFacts, Comparison, FormatOptions, ModelFiles
from spp_export.formats.registry import FORMATS, detect_format, format_of
from spp_export.formats.safetensors.verify import RECOVERY_NAME
from spp_export.models.checkpoint.checkpoint import TOKENIZER_FILES, Checkpoint, open_checkpoint
from spp_export.models.checkpoint.companions import companion, copy_companions, terms
from spp_export.models.dequantise import find_model
from spp_export.models.engines import Engine
from spp_export.models.hub import model_license
from spp_export.models.tokenizer import has_tokenizer, load_tokenizer
from spp_export.planning import Plan, read_plan
from spp_export.planning.plan import dense_plan

if TYPE_CHECKING:
    from spp_export.calibration.activations import TokenBatch


@dataclass(frozen=True)
class ConvertResult:
    """What was written, its size, and the report of its checks.

    form: what the card and `--json` say of the file
    """

    path: Path
    layout: str
    options: FormatOptions
    engines: tuple[Engine, ...]
    nbytes: int
    report: Mapping[str, Any] | None
    form: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        name = format_of(self.options).name
        return {
            "path": str(self.path),
            "format": name,
            "layout": self.layout,
            name: {**self.options.to_dict(), **self.form},
            "bytes": self.nbytes,
            "engines": [engine.to_dict() for engine in self.engines],
            "verify": self.report,
        }


@command(ConvertRequest)
def convert(request: ConvertRequest) -> ConvertResult:
    """Write an export of ours, or a dense model, as ONNX or GGUF; checked and published whole.

    Logits are compared with the PyTorch model's on the scenario's text, or on random tokens without
    one. What quantising costs is measured on answers to the scenario's held-out prompts, or to
    prompts that come with spp: the dense model's, where this machine has it. Raises ParityError
    where they differ: then nothing is published unless `keep_failed`.

        spp_export.convert("out/chemistry", "out/chemistry-onnx", scenario="chemistry.txt")
    """
    made, verify = FORMATS[request.format], request.verify
    made.require()
    device = request.device if verify else None
    request.form.check(device)
    scenario = None if request.scenario is None else read_scenario(request.scenario)
    target = Path(request.output)
    check_target(target, request.force)
    check_place(target)
    place = find_model(os.fspath(request.checkpoint), dequantize=request.dequantize)
    _check_source(place.path, target)
    checkpoint = open_checkpoint(place.path, place.name)
    options = request.fitted(checkpoint.shape).form
    options.check(device)
    plan = _plan(checkpoint)
    files = made.prepare(options, checkpoint, plan)
    _preflight(target, checkpoint, options, files, verify)
    # Before anything is written, for text may be none for this model.
    prompts = scenario.conversations if scenario else ()
    batches = _batches(checkpoint, prompts, request.seed) if verify else ()
    failure: CheckFailed | None = None
    report: dict[str, Any] | None = None
    with publish(target, request.force) as work:
        files.write(place.path, work)
        if verify:
            with scratch_folder(work.parent, "check-") as scratch:
                job = _Check(work, checkpoint, files, batches, scenario, plan, request, scratch)
                report, failure = job.run()
            (work / "verify.json").write_text(dump_json(report), encoding="utf-8")
            if failure and not request.keep_failed:
                raise failure
        (work / "plan.json").write_text(plan.to_json(), encoding="utf-8")
        copy_companions(place.path, (*terms(place.path), RECOVERY_NAME), work)
        slim_plan = plan if (place.path / "plan.json").exists() else None
        license_name = model_license(place.path)
        card = files.card(CardFacts(target.name, report, license_name, converted=slim_plan))
        (work / "README.md").write_text(card, encoding="utf-8")
        write_manifest(work)
        nbytes = sum(path.stat().st_size for path in work.glob(made.weights))
    if failure:
        raise type(failure)(f"{failure} Published all the same, by --keep-failed: {target}")
    return ConvertResult(
        target, checkpoint.layout, options, files.engines, nbytes, report, files.summary
    )


def _batches(checkpoint: Checkpoint, prompts: Sequence[Text], seed: int) -> list[TokenBatch]:
    from spp_export.evaluation.batches import check_batches

    tokenizer = load_tokenizer(checkpoint.path) if prompts else None
    return check_batches(checkpoint, prompts, tokenizer, seed)


@dataclass(frozen=True)
class _Check:
    """The checks of what was just written to `work`, and what quantising cost."""

    work: Path
    checkpoint: Checkpoint
    files: ModelFiles
    batches: Sequence[TokenBatch]
    scenario: Scenario | None
    plan: Plan
    request: ConvertRequest
    scratch: Path

    def run(self) -> tuple[dict[str, Any], CheckFailed | None]:
        """verify.json's content, and the error if the answer is no."""
        import torch

        from spp_export.evaluation.batches import slim_reference, wide_dtype
        from spp_export.evaluation.parity import VerifyReport
        from spp_export.models.loader import load_slim

        checkpoint, files = self.checkpoint, self.files
        own = getattr(torch, files.torch_dtype)
        parameters = checkpoint.shape.parameters(checkpoint.layers)
        exact = wide_dtype(own, checkpoint.family, parameters, "cpu")
        against = Comparison(
            checkpoint.path,
            self.batches,
            lambda place, batches: slim_reference(place, batches, exact, own),
            lambda place: load_slim(place, own),
            self.request.device,
            self.scratch,
        )
        checked = files.check(self.work, against)
        report = VerifyReport(checked.checks, checked.context)
        if not report.passed:
            first = report.failures[0]
            failure = ParityError(f"{first.name}: {first.describe()} This is a defect of spp.")
            return report.to_dict(), failure
        content, wanted = report.to_dict(), self.request.wanted
        if not (checked.quantised or wanted.given):
            return content, None
        quality = None
        if has_tokenizer(checkpoint.path):
            # The dense model answers, and is gone before the other one is loaded.
            judged = judged_texts(dense_at_hand(checkpoint, self.plan), self.scenario, self.plan)
            model = load_slim(checkpoint.path, own)
            tokenizer = load_tokenizer(checkpoint.path)
            quality = measure_file(model, checked.model or model, tokenizer, *judged)
        return record_quality(content, "quantisation", quality, wanted)


def _preflight(
    target: Path, checkpoint: Checkpoint, options: FormatOptions, files: ModelFiles, verify: bool
) -> None:
    check_readable(checkpoint.path, (*TOKENIZER_FILES, *terms(checkpoint.path)))
    needs = convert_needs(target, checkpoint, options, files, verify)
    check_disk(needs)
    check_memory(needs)


def _check_source(path: Path, target: Path) -> None:
    """ModelError for what was converted before, or for an export whose files have changed since;
    OutputError where the result would replace it."""
    if target.resolve() in (path.resolve(), *path.resolve().parents):
        raise OutputError(
            f"{target}: holds the checkpoint that is to be read. Choose another directory."
        )
    if (written := detect_format(path)) and written.converted:
        raise ModelError(
            f"{path}: has {written.title} already. Give the safetensors that it was made from."
        )
    # A plan is the mark of an export whose manifest is gone or can no longer be read.
    ours = wrote(path) or (path / "plan.json").exists()
    if ours and (problems := check_manifest(path)):
        raise ModelError(f"{path}: {problems[0]}. Write the export again.")


def _plan(checkpoint: Checkpoint) -> Plan:
    """The export's own plan; for a dense model one that keeps everything."""
    if stored := companion(checkpoint.path, "plan.json"):
        return read_plan(stored)
    if checkpoint.layout != "uniform":
        raise ModelError(
            f"{checkpoint.path}: has no plan.json, so not a whole export. Give the directory that "
            "'spp export' wrote."
        )
    return dense_plan(checkpoint.shape, checkpoint.fingerprint, checkpoint.name)

"""`convert`: a checkpoint that exists, slim or dense, as an ONNX directory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spp_export.card import onnx_card
from spp_export.checkpoint.atomic import check_target, publish
from spp_export.checkpoint.manifest import check_manifest, write_manifest, wrote
from spp_export.checkpoint.source import open_source
from spp_export.engines import Engine, onnx_engines
from spp_export.errors import CheckFailed, ModelError, OutputError, ParityError
from spp_export.jsonio import dump_json
from spp_export.models import DEMO, ModelLocation, locate_model, model_license
from spp_export.onnx_graph.decoder import Decoder, read_decoder
from spp_export.onnx_graph.options import OnnxOptions, require_all
from spp_export.pipeline.onnx_export import check_graph_files, slim_reference, write_graph
from spp_export.pipeline.onnx_files import is_onnx
from spp_export.plans import LayerPlan, Plan, read_plan
from spp_export.progress import Progress, no_progress
from spp_export.scenario import read_scenario

if TYPE_CHECKING:
    from spp_export.verification import ReferenceLogits


@dataclass(frozen=True)
class ConvertResult:
    """What was written, how large it is, and what was found of it."""

    path: Path
    layout: str
    options: OnnxOptions
    engines: tuple[Engine, ...]
    nbytes: int
    report: Mapping[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "path": str(self.path),
            "format": "onnx",
            "layout": self.layout,
            "onnx": self.options.to_dict(),
            "bytes": self.nbytes,
            "engines": [engine.to_dict() for engine in self.engines],
            "verify": self.report,
        }


def convert(
    checkpoint: str | os.PathLike[str] = DEMO,
    output: str | os.PathLike[str] = "out/onnx",
    *,
    options: OnnxOptions | None = None,
    scenario: str | os.PathLike[str] | None = None,
    force: bool = False,
    verify: bool = True,
    keep_failed: bool = False,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress = no_progress,
) -> ConvertResult:
    """Write an export of ours, or a dense model, as ONNX; checked and published whole.

    `checkpoint` is a directory with safetensors, a hub id or "demo". Logits are compared with the
    PyTorch model's on the scenario's text, or on random tokens without one. Raises ParityError
    where they differ: then nothing is published unless `keep_failed`.
    """
    require_all()
    options = options or OnnxOptions()
    options.check(device if verify else None)
    prompts = read_scenario(scenario).prompts if scenario is not None else ()
    target = Path(output)
    check_target(target, force)
    place = locate_model(os.fspath(checkpoint), progress=progress)
    _check_source(place.path, target)
    decoder = read_decoder(place.path)
    plan = _plan(place, decoder.layout)
    failure: CheckFailed | None = None
    report: dict[str, Any] | None = None
    with publish(target, force) as work:
        write_graph(place.path, work, options, progress)
        if verify:
            reference = _reference(place.path, decoder, options, prompts, seed)
            report, failure = _verify(work, place.path, reference, options, device, progress)
            (work / "verify.json").write_text(dump_json(report), encoding="utf-8")
            if failure and not keep_failed:
                raise failure
        (work / "plan.json").write_text(plan.to_json(), encoding="utf-8")
        if (place.path / "LICENSE").is_file():
            shutil.copyfile(place.path / "LICENSE", work / "LICENSE")
        engines = onnx_engines(decoder.layout, **options.to_dict())
        card = onnx_card(
            target.name,
            plan.model_source,
            options.attention,
            report,
            engines,
            model_license(place.path),
        )
        (work / "README.md").write_text(card, encoding="utf-8")
        write_manifest(work)
        nbytes = sum(path.stat().st_size for path in work.glob("model.onnx*"))
    if failure:
        raise type(failure)(f"{failure} Published all the same, by --keep-failed: {target}")
    return ConvertResult(target, decoder.layout, options, engines, nbytes, report)


def _check_source(path: Path, target: Path) -> None:
    """ModelError for a graph, or for an export whose files have changed since; OutputError where
    the result would replace it."""
    if target.resolve() in (path.resolve(), *path.resolve().parents):
        raise OutputError(
            f"{target}: holds the checkpoint that is to be read. Choose another directory."
        )
    if is_onnx(path):
        raise ModelError(
            f"{path}: is an ONNX directory already. Give the safetensors it was made from."
        )
    # A plan is the mark of an export whose manifest is gone or can no longer be read.
    ours = wrote(path) or (path / "plan.json").exists()
    if ours and (problems := check_manifest(path)):
        raise ModelError(f"{path}: {problems[0]}. Write the export again.")


def _plan(place: ModelLocation, layout: str) -> Plan:
    """The export's own plan; for a dense model one that keeps everything."""
    if (place.path / "plan.json").is_file():
        return read_plan(place.path / "plan.json")
    if layout != "uniform":
        raise ModelError(
            f"{place.path}: has no plan.json, so not a whole export. Give the directory that "
            "'spp export' wrote."
        )
    source = open_source(place.path, place.name)
    everything = LayerPlan(
        tuple(range(source.shape.kv_heads)), tuple(range(source.shape.query_heads)), None
    )
    return Plan(
        model_fingerprint=source.fingerprint,
        model_source=source.name,
        layout="uniform",
        compensation="none",
        layers=(everything,) * source.shape.num_layers,
    )


def _reference(
    checkpoint: Path, decoder: Decoder, options: OnnxOptions, prompts: Sequence[str], seed: int
) -> ReferenceLogits:
    import torch

    from spp_export.pipeline.verify import check_batches, wide_dtype

    tokenizer = None
    if prompts:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    batches = check_batches(decoder.shape.vocab_size, prompts, tokenizer, seed)
    own = getattr(torch, options.torch_dtype)
    exact = wide_dtype(own, decoder.shape.parameters(decoder.layers), "cpu")
    return slim_reference(checkpoint, batches, exact, options)


def _verify(
    work: Path,
    checkpoint: Path,
    reference: ReferenceLogits,
    options: OnnxOptions,
    device: str,
    progress: Progress,
) -> tuple[dict[str, Any], CheckFailed | None]:
    from spp_export.verification import VerifyReport

    scratch = work / "scratch"
    scratch.mkdir()
    found = check_graph_files(
        work,
        checkpoint,
        reference,
        options,
        device=device,
        scratch=scratch,
        progress=progress,
    )
    shutil.rmtree(scratch)
    report = VerifyReport(found.checks, {"onnx": options.to_dict()})
    content = {**report.to_dict(), **found.quantisation()}
    if report.passed:
        return content, None
    first = report.failures[0]
    return content, ParityError(f"{first.name}: {first.describe()} This is a defect of spp.")

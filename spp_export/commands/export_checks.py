"""The checks of an export in any format, and its quality."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from spp_export.commands.export_request import ExportResult
from spp_export.commands.requests import ExportRequest
from spp_export.common.errors import (
    CheckFailed,
    ParityError,
    QualityError,
)
from spp_export.data.scenario import Scenario
from spp_export.evaluation.batches import exact_dtype, slim_reference
from spp_export.formats.card import gguf_card, model_card, onnx_card
from spp_export.formats.gguf.format import (
    check_exported_file,
    promised_contents,
)
from spp_export.formats.gguf.options import GgufOptions
from spp_export.formats.gguf.write import stored_bytes
from spp_export.formats.onnx.format import GraphChecks, check_graph_files
from spp_export.formats.onnx.options import OnnxOptions
from spp_export.formats.safetensors.verify import Checked, check_directory
from spp_export.models.engines import gguf_engines, onnx_engines
from spp_export.models.hub import model_license
from spp_export.models.session import Session
from spp_export.planning.bound import predicted
from spp_export.planning.written import written_shape
from spp_export.slicing.compensation import (
    Compensator,
)


def check_export(
    session: Session,
    result: ExportResult,
    scenario: Scenario | None,
    work: Path,
    request: ExportRequest,
    compensation: Compensator,
) -> tuple[dict[str, Any], CheckFailed | None]:
    """verify.json's content, and the error if the answer is no."""
    from spp_export.evaluation.parity import rounded
    from spp_export.evaluation.quality import measure_quality

    prompts = scenario.prompts if scenario else ()
    slim = work / "slim" if request.onnx or request.gguf else work
    checked = check_directory(slim, session, result.plan, prompts, request.seed, compensation)
    content, model = checked.report.to_dict(), checked.slim
    failed = list(checked.report.failures)
    if request.onnx and not failed:
        found = _check_graph(session, checked, work, request.onnx)
        content["checks"] += [check.to_dict() for check in found.checks]
        content["onnx"] = request.onnx.to_dict()
        content |= found.quantisation()
        failed = [check for check in found.checks if not check.passed]
        if found.model and not failed:
            from spp_export.formats.onnx.runtime.module import OrtModule

            model = OrtModule(found.model, session.device)
    if result.gguf and not failed:
        found_file = check_exported_file(session, checked, work, result.gguf)
        content["checks"] += [check.to_dict() for check in found_file.checks]
        content |= found_file.context
        failed = [check for check in found_file.checks if not check.passed]
    if failed or model is None:
        content["passed"] = False
        first = failed[0]
        return content, ParityError(
            f"{first.name}: {first.describe()} Nothing to change in the options helps: "
            "this is a defect of spp or of the checkpoint."
        )
    held_out = scenario.split()[1] if scenario else ()
    quality = (
        measure_quality(session.model, model, session.tokenizer, held_out) if held_out else None
    )
    content["quality"] = rounded(quality.to_dict()) if quality else None
    limit = request.max_perplexity
    if limit is None:
        return content, None
    within = quality is not None and quality.ratio <= limit
    content["quality_gate"] = {"max_perplexity_ratio": limit, "passed": within}
    content["passed"] = content["passed"] and within
    if quality is None:
        return content, QualityError(
            "the quality gate needs held-out text: a scenario of at least four prompts."
        )
    if not within:
        return content, QualityError(
            f"held-out perplexity is {quality.ratio:.3f}x dense, the gate allows {limit:g}x. "
            "Keep more (--keep) or raise the gate."
        )
    return content, None


def _check_graph(
    session: Session, checked: Checked, work: Path, options: OnnxOptions
) -> GraphChecks:
    """A graph against the oracle that its checkpoint was compared with, in its own precision."""
    import torch

    assert checked.reference is not None
    reference, slim = checked.reference, work / "slim"
    if options.torch_dtype != session.dtype:
        reference = slim_reference(
            slim,
            reference.batches,
            exact_dtype(session, {}),
            getattr(torch, options.torch_dtype),
            layerwise=session.from_disk,
        )
    return check_graph_files(
        work,
        slim,
        reference,
        options,
        device=session.device,
        scratch=slim,
    )


def as_onnx(result: ExportResult, session: Session, options: OnnxOptions) -> ExportResult:
    """Engines of a graph, and sizes in its precision."""
    source, compiled = session.source, result.plan
    size = options.element_bytes
    dense = replace(source.shape, element_bytes=size)
    written = replace(written_shape(source, compiled), element_bytes=size)
    return replace(
        result,
        onnx=options,
        predicted=predicted(dense, compiled.written_shapes(source.shape), written),
        engines=onnx_engines(compiled.written_layout, **options.to_dict()),
    )


def as_gguf(result: ExportResult, session: Session, options: GgufOptions) -> ExportResult:
    """What the file is to hold, which engines take it, and sizes in its precision."""
    source, compiled = session.source, result.plan
    contents = promised_contents(source, compiled, options)
    assert result.needs
    file = sum(stored_bytes(tensor) for tensor in contents.tensors)
    needs = replace(result.needs, disk={**result.needs.disk, "GGUF file": file})
    size = contents.options.element_bytes
    dense = replace(source.shape, element_bytes=size)
    written = replace(written_shape(source, compiled), element_bytes=size)
    return replace(
        result,
        gguf=contents,
        needs=needs,
        predicted=predicted(dense, compiled.written_shapes(source.shape), written),
        engines=gguf_engines(contents.architecture.name),
    )


def export_card(
    name: str, session: Session, result: ExportResult, report: Mapping[str, Any] | None
) -> str:
    license_name = model_license(session.source.path)
    sizes = result.plan, result.shape, result.predicted
    base = result.plan.model_source
    if result.gguf:
        said = result.gguf.summary()
        return gguf_card(name, base, said, report, result.engines, license_name, sizes)
    if result.onnx is None:
        return model_card(name, *sizes, report, result.engines, license_name)
    form = result.onnx.attention
    return onnx_card(name, base, form, report, result.engines, license_name, sizes)

"""The checks of an export in any format, and its quality."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spp_export.calibration.answers import scenario_traffic
from spp_export.calibration.reading import Text
from spp_export.commands.export_request import ExportResult
from spp_export.commands.quality import judged_texts, measure_file, record_quality
from spp_export.commands.requests import ExportRequest
from spp_export.common.errors import (
    CheckFailed,
    ParityError,
    QualityError,
)
from spp_export.data.scenario import Scenario
from spp_export.evaluation.batches import exact_dtype, slim_reference
from spp_export.formats.format import Comparison, ModelFiles
from spp_export.formats.safetensors.verify import check_directory
from spp_export.models.session import Session
from spp_export.slicing.compensation import Compensator, plan_answering

if TYPE_CHECKING:
    from spp_export.calibration.activations import TokenBatch
    from spp_export.evaluation.parity import ReferenceLogits, VerifyReport


def check_export(
    session: Session,
    result: ExportResult,
    scenario: Scenario | None,
    places: tuple[Path, Path],
    files: ModelFiles,
    request: ExportRequest,
    compensation: Compensator,
    scratch: Path,
) -> tuple[dict[str, Any], CheckFailed | None]:
    """The content of verify.json, and the error to raise if a check failed.

    places: of the slim checkpoint, and of the files made from it. scratch: of the caller, for what
    is needed no longer than the checks.
    """
    import torch

    from spp_export.evaluation.parity import VerifyReport
    from spp_export.evaluation.quality import held_out_source

    texts = scenario.conversations if scenario else ()
    slim, out = places
    checked = check_directory(slim, session, result.plan, texts, request.seed, compensation)
    content = checked.report.to_dict()
    if not checked.report.passed:
        return content, _defect(checked.report)
    assert checked.reference
    assert checked.slim

    def reference(place: Path, batches: Sequence[TokenBatch]) -> ReferenceLogits:
        known, dtype = checked.reference, files.torch_dtype
        if known and place == slim and batches is known.batches and dtype == session.dtype:
            return known
        exact, disk = exact_dtype(session, {}), session.from_disk
        return slim_reference(place, batches, exact, getattr(torch, dtype), layerwise=disk)

    against = Comparison(
        slim, checked.reference.batches, reference, session.slim_model, session.device, scratch
    )
    converted = files.check(out, against)
    content["checks"] += [check.to_dict() for check in converted.checks]
    content |= converted.context
    report = VerifyReport(converted.checks)
    if not report.passed:
        return {**content, "passed": False}, _defect(report)
    model, quality = converted.model or checked.slim, None
    judged: Sequence[Text] = ()
    limit = request.calibration_tokens
    if scenario:
        answering = plan_answering(result.plan, request)
        judged = scenario_traffic(session, scenario, limit, answering).held_out.texts
    source = held_out_source(judged)
    if converted.quantised:
        if not judged:
            judged, source = judged_texts(session, scenario, result.plan)
        cost = measure_file(checked.slim, model, session.tokenizer, judged, source, limit)
        content["quantisation"] = cost.to_dict() if cost else None
    if judged:
        quality = measure_file(session.model, model, session.tokenizer, judged, source, limit)
    content, worse = record_quality(content, "quality", quality, request.wanted)
    most = request.max_perplexity
    if most is None or worse:
        return content, worse
    within = quality is not None and quality.ratio <= most
    content["quality_gate"] = {"max_perplexity_ratio": most, "passed": within}
    content["passed"] = content["passed"] and within
    if quality is None:
        return content, QualityError(
            "--max-perplexity needs held-out text: a scenario of at least four prompts."
        )
    if not within:
        return content, QualityError(
            f"held-out perplexity is {quality.ratio:.3f}x dense, the gate allows {most:g}x. "
            "Keep more (--keep) or raise the gate."
        )
    return content, None


def _defect(report: VerifyReport) -> ParityError:
    first = report.failures[0]
    return ParityError(
        f"{first.name}: {first.describe()} Nothing to change in the options helps: this is a "
        "defect of spp or of the checkpoint."
    )

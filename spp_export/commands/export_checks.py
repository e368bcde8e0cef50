"""The checks of an export in any format, and its quality."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spp_export.commands.export_request import ExportResult
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
from spp_export.slicing.compensation import Compensator

if TYPE_CHECKING:
    from spp_export.calibration.activations import TokenBatch
    from spp_export.evaluation.parity import ReferenceLogits


def check_export(
    session: Session,
    result: ExportResult,
    scenario: Scenario | None,
    places: tuple[Path, Path],
    files: ModelFiles,
    request: ExportRequest,
    compensation: Compensator,
) -> tuple[dict[str, Any], CheckFailed | None]:
    """The content of verify.json, and the error to raise if a check failed.

    places: of the slim checkpoint, and of the files made from it
    """
    import torch

    from spp_export.evaluation.parity import rounded
    from spp_export.evaluation.quality import measure_quality

    prompts = scenario.prompts if scenario else ()
    slim, out = places
    checked = check_directory(slim, session, result.plan, prompts, request.seed, compensation)
    content, model = checked.report.to_dict(), checked.slim
    failed = list(checked.report.failures)

    def reference(batches: Sequence[TokenBatch]) -> ReferenceLogits:
        known, dtype = checked.reference, files.torch_dtype
        if known and batches is known.batches and dtype == session.dtype:
            return known
        exact, disk = exact_dtype(session, {}), session.from_disk
        return slim_reference(slim, batches, exact, getattr(torch, dtype), layerwise=disk)

    if not failed:
        assert checked.reference
        against = Comparison(
            slim, checked.reference.batches, reference, session.device, model, session.from_disk
        )
        converted = files.check(out, against)
        content["checks"] += [check.to_dict() for check in converted.checks]
        content |= converted.context
        failed = [check for check in converted.checks if not check.passed]
        model = converted.model or model
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

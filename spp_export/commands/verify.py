"""`verify`: whether a written directory is what its plan and the dense model promise."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from spp_export.commands.quality import gate, judged_texts, measure_file
from spp_export.commands.requests import VerifyRequest
from spp_export.common.disk import clear_leftovers, scratch_folder, working_place
from spp_export.common.errors import UsageError
from spp_export.common.manifest import check_manifest, require_export
from spp_export.common.options import command
from spp_export.data.scenario import read_scenario
from spp_export.formats.format import Promise
from spp_export.formats.registry import FORMATS, detect_format
from spp_export.formats.safetensors.verify import RECOVERY_NAME
from spp_export.models.session import open_session
from spp_export.planning import read_plan, validate_plan

if TYPE_CHECKING:
    from spp_export.evaluation.parity import VerifyReport


@command(VerifyRequest)
def verify(request: VerifyRequest) -> VerifyReport:
    """Check the integrity and parity of an exported directory against its dense model.

    Logits are compared on the scenario's text, or on seeded random tokens without one: parity does
    not depend on the text. Quality does, and is measured of quantised weights, and of others for
    `max_kl` and `same_token`, on the dense model's answers to the scenario's held-out prompts, or
    to prompts that come with spp. Raises OutputError where the directory is no export.

        assert spp_export.verify("out/chemistry", model="org/name").passed
    """
    directory = Path(request.out)
    require_export(directory)
    from spp_export.evaluation.parity import Check, VerifyReport

    problems = check_manifest(directory)
    integrity = Check("files as the manifest lists them", not problems, detail="; ".join(problems))
    if problems:
        # Nothing more can be said of files that are not the ones that were written.
        return VerifyReport((integrity,))
    made = detect_format(directory) or FORMATS["safetensors"]
    if made.converted and (directory / RECOVERY_NAME).is_file():
        raise UsageError(
            f"{directory}: was converted from an export that was trained further, so its weights "
            "do not follow from the dense model. They were compared with that export's when it was "
            "converted; its files are as they were written."
        )
    dtype: str | None = request.dtype or made.verify_dtype(directory)
    session = open_session(
        request.model,
        device=request.device,
        dtype=dtype,
        layerwise=request.layerwise,
        dequantize=request.dequantize,
    )
    compiled = read_plan(directory / "plan.json")
    validate_plan(compiled, session.source.shape, session.source.fingerprint)
    scenario = None if request.scenario is None else read_scenario(request.scenario)
    prompts = scenario.conversations if scenario else ()
    # Where temporary files go, with a lock: what a killed one left, the next removes.
    beside = Path(tempfile.gettempdir()) / "spp-verify"
    clear_leftovers(beside)
    with working_place(beside) as place, scratch_folder(place) as scratch:
        against = Promise(session, compiled, prompts, request.seed, scratch)
        checked = made.verify(directory, against)
        report = VerifyReport((integrity, *checked.checks), checked.context)
        if not report.passed or not (checked.quantised or request.wanted.given):
            return report
        assert checked.model
        judged = judged_texts(session, scenario, compiled)
        quality = measure_file(session.model, checked.model, session.tokenizer, *judged)
    context = {**checked.context, "quality": quality.to_dict() if quality else None}
    failure, checks = gate(quality, request.wanted), report.checks
    if request.wanted.given:
        limit = Check("distance from the dense model", failure is None, detail=str(failure or ""))
        checks = (*checks, limit)
    return VerifyReport(checks, context)

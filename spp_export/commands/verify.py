"""`verify`: whether a written directory is what its plan and the dense model promise."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from spp_export.common.errors import OutputError, UsageError
from spp_export.common.manifest import check_manifest, listed_names
from spp_export.data.scenario import read_scenario
from spp_export.formats.gguf.format import is_gguf
from spp_export.formats.onnx.format import graph_dtype, is_onnx
from spp_export.formats.safetensors.verify import RECOVERY_NAME, check_directory
from spp_export.models.hub import DEMO
from spp_export.models.session import open_session
from spp_export.planning import read_plan, validate_plan

if TYPE_CHECKING:
    from spp_export.evaluation.parity import VerifyReport


def verify(
    out: str | os.PathLike[str],
    *,
    model: str = DEMO,
    scenario: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    layerwise: bool | None = None,
    seed: int = 0,
) -> VerifyReport:
    """Integrity and parity of an exported directory against the dense model it came from.

    Logits are compared on the scenario's text, or on seeded random tokens without one: parity does
    not depend on the text. `layerwise` runs the models layer by layer, their weights staying on
    disk; None does so where they do not fit in memory. Raises OutputError where the directory is no
    export.
    """
    from spp_export.evaluation.parity import Check, VerifyReport

    directory = Path(out)
    if not (directory / "plan.json").is_file() and "plan.json" not in listed_names(directory):
        raise OutputError(f"{directory}: no plan.json, so not an export of spp.")
    problems = check_manifest(directory)
    integrity = Check("files as the manifest lists them", not problems, detail="; ".join(problems))
    if problems:
        # Nothing more can be said of files that are not the ones that were written.
        return VerifyReport((integrity,))
    converted = is_onnx(directory) or is_gguf(directory)
    if converted and (directory / RECOVERY_NAME).is_file():
        raise UsageError(
            f"{directory}: was converted from an export that was trained further, so its weights "
            "do not follow from the dense model. They were compared with that export's when it was "
            "converted; its files are as they were written."
        )
    if dtype is None and is_onnx(directory):
        dtype = graph_dtype(directory)
    session = open_session(model, device=device, dtype=dtype, layerwise=layerwise)
    compiled = read_plan(directory / "plan.json")
    validate_plan(compiled, session.source.shape, session.source.fingerprint)
    prompts = read_scenario(scenario).prompts if scenario is not None else ()
    if is_onnx(directory):
        from spp_export.formats.onnx.format import check_onnx_directory

        report = check_onnx_directory(directory, session, compiled, prompts, seed)
    elif is_gguf(directory):
        from spp_export.formats.gguf.format import check_gguf_directory

        report = check_gguf_directory(directory, session, compiled, prompts, seed)
    else:
        report = check_directory(directory, session, compiled, prompts, seed).report
    return VerifyReport((integrity, *report.checks), report.context)

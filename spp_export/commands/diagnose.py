"""`diagnose`: which domains a scenario draws on."""

from __future__ import annotations

from spp_export.commands.requests import DiagnoseRequest
from spp_export.common.options import command
from spp_export.data.artifacts import open_artifacts
from spp_export.data.scenario import read_scenario
from spp_export.domains.diagnosis import Diagnosis, diagnose_scenario
from spp_export.models.session import open_session


@command(DiagnoseRequest)
def diagnose(request: DiagnoseRequest) -> Diagnosis:
    """Diagnose a scenario by the probes of a model's artifacts.

    As in a plan, the prompts that an export measures its quality on take no part, and of the others
    as much is read as `calibration_tokens` allows.

        print(spp_export.diagnose("chemistry.txt").to_dict()["mixture"])
    """
    text = read_scenario(request.scenario)
    session = open_session(
        request.model,
        device=request.device,
        dtype=request.dtype,
        layerwise=request.layerwise,
        dequantize=request.dequantize,
        parallel=request.parallel,
    )
    artifacts = open_artifacts(request.artifacts, request.model, session.source)
    return diagnose_scenario(session, artifacts, text, request.regime, request.calibration_tokens)

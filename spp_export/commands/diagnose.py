"""`diagnose`: which domains a scenario draws on."""

from __future__ import annotations

import os

from spp_export.data.artifacts import open_artifacts
from spp_export.data.scenario import read_scenario
from spp_export.domains.diagnosis import Diagnosis, diagnose_prompts
from spp_export.models.hub import DEMO
from spp_export.models.session import open_session


def diagnose(
    scenario: str | os.PathLike[str],
    *,
    model: str = DEMO,
    artifacts: str | os.PathLike[str] | None = None,
    regime: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    layerwise: bool | None = None,
) -> Diagnosis:
    """Diagnosis of a scenario file (or "-") by the probes of a model's artifacts.

    All prompts take part; `spp export` leaves those out that it measures quality on. `layerwise` is
    as of `verify`.
    """
    text = read_scenario(scenario)
    session = open_session(model, device=device, dtype=dtype, layerwise=layerwise)
    found = open_artifacts(artifacts, model, session.source)
    return diagnose_prompts(session, found, text.prompts, regime)

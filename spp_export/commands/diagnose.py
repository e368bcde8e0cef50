"""`diagnose`: which domains a scenario draws on."""

from __future__ import annotations

import os
from collections.abc import Sequence

from spp_export.common.errors import ScenarioError
from spp_export.common.progress import Progress, no_progress
from spp_export.data.artifacts import Artifacts
from spp_export.data.scenario import read_scenario
from spp_export.domains.diagnosis import Diagnosis, diagnose_activations
from spp_export.models.hub import DEMO
from spp_export.models.session import Session, open_artifacts, open_session


def diagnose(
    scenario: str | os.PathLike[str],
    *,
    model: str = DEMO,
    artifacts: str | os.PathLike[str] | None = None,
    regime: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    layerwise: bool | None = None,
    progress: Progress = no_progress,
) -> Diagnosis:
    """Diagnosis of a scenario file (or "-") by the probes of a model's artifacts.

    All prompts take part; `spp export` leaves those out that it measures quality on. `layerwise` is
    as of `verify`.
    """
    text = read_scenario(scenario)
    session = open_session(
        model, device=device, dtype=dtype, layerwise=layerwise, progress=progress
    )
    found = open_artifacts(artifacts, model, session.source)
    return diagnose_prompts(session, found, text.prompts, regime)


def diagnose_prompts(
    session: Session, artifacts: Artifacts, prompts: Sequence[str], regime: str | None = None
) -> Diagnosis:
    """Forward the prompts once through the dense model and ask the probes.

    Raises ScenarioError where the tokenizer leaves nothing of them.
    """
    from spp_export.calibration.activations import TextMeans, observe, token_batches

    shape = session.source.shape
    batches = token_batches(session.tokenizer, prompts)
    if not batches:
        raise ScenarioError("the scenario has no tokens for this model. Give it some text.")
    means = TextMeans("residual", len(prompts), shape.num_layers, shape.hidden_size)
    observe(
        session.model,
        session.source.family,
        batches,
        [means],
        progress=session.progress,
        description="diagnosing the scenario",
    )
    seen = sorted(index for batch in batches for index in batch.texts)
    return diagnose_activations(means.values[seen], artifacts, regime)

"""The history that Probe Pruning fuses its probes with: made once per session and text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from spp_export.models.session import Session

if TYPE_CHECKING:
    from spp_export.importance.probe_pruning import History


def history_of(session: Session, texts: Sequence[str]) -> History:
    """Position-resolved moments of `texts` on the dense model."""
    from spp_export.calibration.activations import token_batches
    from spp_export.importance.probe_pruning import gather_history

    key = ("history", tuple(sorted(texts)))
    if key not in session.remembered:
        session.remembered[key] = gather_history(
            session.model,
            session.source.family,
            session.source.shape,
            token_batches(session.tokenizer, sorted(texts)),
            progress=session.progress,
        )
    found: History = session.remembered[key]
    return found

"""What the dense model answers prompts with: every engine draws from the same distribution, the
model's own at the sampling settings of its generation config, by another stream of random numbers.

An engine is one file here and one line in `ENGINES`.
"""

from __future__ import annotations

from spp_export.calibration.engines.base import AnswerEngine, Dense, EngineFailed, Prompts
from spp_export.calibration.engines.batches import Batches
from spp_export.calibration.engines.vllm import Vllm

# The fastest first; the last one runs everywhere.
ENGINES: tuple[AnswerEngine, ...] = (Vllm(), Batches())


def engines_at_hand(dense: Dense, prompts: Prompts) -> tuple[AnswerEngine, ...]:
    """Those that can answer these prompts on this machine, the fastest first."""
    return tuple(engine for engine in ENGINES if engine.suits(dense, prompts))


__all__ = ["ENGINES", "AnswerEngine", "Dense", "EngineFailed", "Prompts", "engines_at_hand"]

"""Criteria: how much each unit matters to a collection of text. One short file each.

A criterion reads the statistics of one layer and gives scores of its heads [H] and channels [I],
higher means keep. It knows nothing of budgets, other layers or shapes: that is the plan's business.
Making scores of different layers comparable is `comparable`'s, for the same reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module

from spp_export.calibration.statistics import (
    AttentionInputs,
    Axis,
    FloatArray,
    Gradients,
    LayerStatistics,
    LayerWeights,
    MlpInputs,
)
from spp_export.importance.base import Convention, Criterion, Need
from spp_export.importance.comparable import (
    COMPARABLE,
    LOSSES,
    comparable,
    comparable_kinds,
)

__all__ = [
    "COMPARABLE",
    "CRITERIA",
    "FILES",
    "LOSSES",
    "AttentionInputs",
    "Axis",
    "Convention",
    "Criterion",
    "FloatArray",
    "Gradients",
    "LayerStatistics",
    "LayerWeights",
    "MlpInputs",
    "Need",
    "comparable",
    "comparable_kinds",
    "registry",
]

# One line per criterion: the file of this folder that holds it.
FILES = (
    "energy",
    "axis",
    "taylor",
    "wanda_sp",
    "wanda",
    "flap",
    "ppsp",
    "llm_pruner",
    "ria",
    "dass",
    "loraprune",
    "magnitude",
    "random",
)


def registry(files: Iterable[str]) -> Mapping[str, Criterion]:
    """The `CRITERION` of each file of this folder, by its name."""
    found = [import_module(f"{__name__}.{file}").CRITERION for file in files]
    return {criterion.name: criterion for criterion in found}


CRITERIA: Mapping[str, Criterion] = registry(FILES)

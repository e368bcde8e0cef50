"""Criteria: how much units matter to a collection of text. One short file each.

A criterion reads one layer and gives scores of its heads [H] and channels [I], higher means keep,
or losses of whole sets of them. Of budgets, other layers and shapes it knows nothing: these are the
plan's business.
Making scores of different layers comparable is `comparable`'s, for the same reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module

from spp_export.calibration.statistics import (
    AttentionInputs,
    Axis,
    Gradients,
    LayerStatistics,
    LayerWeights,
    MlpInputs,
)
from spp_export.importance.base import Convention, Criterion, Need, SetCriterion
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
    "SCORING",
    "AttentionInputs",
    "Axis",
    "Convention",
    "Criterion",
    "Gradients",
    "LayerStatistics",
    "LayerWeights",
    "MlpInputs",
    "Need",
    "SetCriterion",
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
    "obs",
)


def registry(files: Iterable[str]) -> Mapping[str, Criterion | SetCriterion]:
    """The `CRITERION` of each file of this folder, by its name."""
    criteria = [import_module(f"{__name__}.{file}").CRITERION for file in files]
    return {criterion.name: criterion for criterion in criteria}


CRITERIA: Mapping[str, Criterion | SetCriterion] = registry(FILES)
SCORING: Mapping[str, Criterion] = {
    name: criterion for name, criterion in CRITERIA.items() if isinstance(criterion, Criterion)
}
"""Those that give scores of units, which can be kept per domain and mixed."""

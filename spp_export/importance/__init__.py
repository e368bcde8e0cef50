"""Criteria: how much units matter to a collection of text. One short file each.

A criterion reads one layer and gives scores of its heads [H] and channels [I], higher means keep,
or losses of whole sets of them. Of budgets, other layers and shapes it knows nothing: these are the
plan's business, and scores of different layers are made comparable by `comparable`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module

from spp_export.importance.base import Criterion, SetCriterion

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
    "reap",
    "random",
    "obs",
    "fisher",
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

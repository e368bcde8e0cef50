"""Probe Pruning (ICLR 2025, arXiv 2502.15618): masks decided on the text about to be processed.

A small probe of the batch is run ahead through each block of the already pruned prefix, fused with
a history of calibration text, and decides what the block drops. `scenario_scores` takes a
scenario's text for the batch, once, and gives scores for a plan; `probe_pruning` decides anew for
every batch on the dense model, as a baseline that saves no parameter.
"""

from __future__ import annotations

from spp_export.importance.probe_pruning.dynamic import Decision, DynamicPruning, probe_pruning
from spp_export.importance.probe_pruning.history import History, gather_history
from spp_export.importance.probe_pruning.scenario import scenario_scores
from spp_export.importance.probe_pruning.score import ratio_for

__all__ = [
    "Decision",
    "DynamicPruning",
    "History",
    "gather_history",
    "probe_pruning",
    "ratio_for",
    "scenario_scores",
]

"""Probe Pruning (ICLR 2025, arXiv 2502.15618): masks decided on the text about to be processed.

A small probe of the batch is run ahead through each block of the already pruned prefix, fused with
a history of calibration text, and decides what the block drops. `scenario_scores` takes a
scenario's text for the batch, once, and gives scores for a plan. Deciding anew for every batch
saves no parameter: that baseline is benchmarks/spp_campaigns/probe_pruning.py.
"""

from __future__ import annotations

from spp_export.importance.probe_pruning.history import History, gather_history
from spp_export.importance.probe_pruning.scenario import scenario_scores

__all__ = ["History", "gather_history", "scenario_scores"]

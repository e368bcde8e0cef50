"""How good a choice of units is: rows of one table, measured alike, beside the controls that can
say no. What a row removes is planned elsewhere; here it is only measured."""

from __future__ import annotations

from spp_export.evaluation.harness.grid import BASELINES, DYNAMIC, standard_rows
from spp_export.evaluation.harness.rows import PlannedRow, Row, RowPlanner, row_key

__all__ = ["BASELINES", "DYNAMIC", "PlannedRow", "Row", "RowPlanner", "row_key", "standard_rows"]

"""Groups of weights in the campaign on llm-compressor; `make test-quantised` runs the rest."""

from __future__ import annotations

import pytest
from torch import nn

from spp_campaigns.quantised import group_size
from spp_export.common.errors import UsageError


def projections(*rows: int, head: int = 16) -> nn.Module:
    """A model with projections of so long rows, and a language model head."""
    layers = {f"layer{index}": nn.Linear(size, 8) for index, size in enumerate(rows)}
    return nn.ModuleDict({**layers, "lm_head": nn.Linear(head, 8)})


@pytest.mark.parametrize(
    ("rows", "group"), [((256, 128), 128), ((576, 1536), 64), ((64, 96), 32), ((32,), 32)]
)
def test_the_largest_group_divides_every_row_but_the_heads(rows, group):
    assert group_size(projections(*rows)) == group


def test_no_group_is_said_in_one_line():
    with pytest.raises(UsageError, match=r"rows have 48 to 64 weights.*--width-multiple 32"):
        group_size(projections(64, 48))

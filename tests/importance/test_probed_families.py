"""Probe Pruning's blocks of families that compute otherwise than Llama: what is run ahead is what
the model's own forward pass reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import KNOWN, make_dense, tokens

from spp_export.importance.probe_pruning.blocks import KNOWN as KNOWN_FEATURES
from spp_export.importance.probe_pruning.blocks import layer_blocks
from spp_export.importance.probe_pruning.probe import whole
from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.models.families import FAMILIES
from spp_export.models.loader import load_dense

pytestmark = pytest.mark.thinned(most=4)

PROBED = [name for name in KNOWN if FAMILIES[name].features <= KNOWN_FEATURES]


def test_opt_is_among_them() -> None:
    """As in Probe Pruning's own table."""
    assert {"opt", "arcee", "starcoder2"} <= {*PROBED}


@pytest.mark.parametrize("name", PROBED)
@torch.no_grad()
def test_a_whole_probe_reads_what_the_model_reads(name: str, tmp_path: Path) -> None:
    source = open_source(make_dense(name, tmp_path))
    model = load_dense(source.path, torch.float64)
    seen: dict[tuple[Any, str], Any] = {}
    pairs = layer_blocks(model, source.family, source.shape)

    def keep(block: Any, what: str) -> Callable[..., None]:
        def hook(_module: Any, args: Any, last: Any = None) -> None:
            seen.setdefault((block, what), args[0] if last is None else last)

        return hook

    for block in (block for pair in pairs for block in pair):
        block.norm.register_forward_hook(keep(block, "x"))
        block.consumer.register_forward_pre_hook(keep(block, "read"))
        block.consumer.register_forward_hook(keep(block, "wrote"))
    for attention, mlp in pairs:
        attention.body.register_forward_pre_hook(keep(mlp, "call"), with_kwargs=True)
        attention.body.register_forward_pre_hook(keep(attention, "call"), with_kwargs=True)
    ids = tokens()
    model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    for block in (block for pair in pairs for block in pair):
        call = {k: v for k, v in seen[block, "call"].items() if k != "hidden_states"}
        x, read = seen[block, "x"], seen[block, "read"]
        x = x if x.dim() == 3 else x.unflatten(0, ids.shape)
        ahead = block.ahead(x, whole(torch.ones_like(ids, dtype=torch.bool)), call)
        torch.testing.assert_close(ahead, read.view_as(ahead), rtol=1e-9, atol=1e-9)
        wrote = block.run(x, call)
        torch.testing.assert_close(wrote, seen[block, "wrote"].view_as(wrote), rtol=0, atol=1e-9)

"""Layers that learn, each by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from family_models import KNOWN, load, make_dense, make_slim

from spp_export.calibration.reading import TokenText
from spp_export.commands.layer_training import LayerText, learn_layers
from spp_export.models.checkpoint.checkpoint import open_source

ROWS = torch.randint(3, 97, (16, 11), generator=torch.Generator().manual_seed(4)).tolist()
TEXTS = [TokenText((tuple(row),)) for row in ROWS]
TEXT = LayerText(TEXTS, [1.0] * len(TEXTS))


@pytest.mark.parametrize("name", KNOWN)
def test_layers_of_every_family_come_nearer_to_the_dense_ones(name: str, tmp_path: Path):
    """And nothing but projections of the layers that were cut changes."""
    source = open_source(make_dense(name, tmp_path / "dense"))
    family = source.family
    pair = make_slim(source, "per-layer", tmp_path / "slim")
    dense, slim = load(source.path).float(), load(pair.slim).float()
    slim.requires_grad_(False)
    first = {key: value.clone() for key, value in slim.state_dict().items()}
    kept = {}
    cut = range(source.shape.num_layers)
    learnt = learn_layers(
        dense, slim, family, cut, TEXT, 4, keep=lambda layer, values: kept.update({layer: values})
    )
    assert [one.layer for one in learnt] == list(kept)
    assert set(kept) <= set(cut)
    assert all(one.after <= one.before for one in learnt)
    assert sum(one.after for one in learnt) < sum(one.before for one in learnt)
    changed = {key for key, value in slim.state_dict().items() if not value.equal(first[key])}
    assert changed
    assert changed <= {key for values in kept.values() for key in values}
    roles = tuple(family.projections)
    assert all(key.removesuffix(".weight").endswith(roles) for key in changed)
    assert not any(parameter.requires_grad for parameter in slim.parameters())

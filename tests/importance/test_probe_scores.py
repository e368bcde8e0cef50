"""Fusion, PPsp and counts against explicit matrices and the published table."""

from __future__ import annotations

import pytest
import torch
from probed_models import explicit_scores

from spp_export.common.errors import UsageError
from spp_export.importance.ppsp import channel_scores, head_scores
from spp_export.importance.probe_pruning.blocks import AttentionBlock, MlpBlock
from spp_export.importance.probe_pruning.score import Targets, fuse, ppsp
from spp_export.models.shape import ModelShape


def shape(layers, heads, groups, channels, dim=128):
    return ModelShape("llama", layers, heads * dim, heads, groups, dim, channels, 1000, False, 2)


LLAMA_2_7B = shape(32, 32, 32, 11008)
LLAMA_2_13B = shape(40, 40, 40, 13824)
LLAMA_3_8B = shape(32, 32, 8, 14336)


def block(kind, layer, sizes):
    none = torch.nn.Identity()
    parts = {"norm": none, "body": none, "consumer": torch.nn.Linear(1, 1)}
    if kind is AttentionBlock:
        parts |= {"units": sizes.query_heads, "step": sizes.head_dim, "norms": None}
        return kind(layer, query=none, key=none, value=none, **parts)
    parts |= {"units": sizes.channels, "step": 1}
    return kind(layer, **parts)


@pytest.mark.parametrize(
    ("sizes", "ratio", "heads", "channels"),
    [
        (LLAMA_2_7B, 0.2, 7, 2368),
        (LLAMA_2_7B, 0.4, 14, 4800),
        (LLAMA_2_13B, 0.2, 8, 3008),
        (LLAMA_2_13B, 0.4, 17, 5888),
        (LLAMA_3_8B, 0.4, 14, 6272),
    ],
)
def test_published_counts_are_dropped_lowest_first(sizes, ratio, heads, channels):
    targets = Targets.at(sizes, ratio, 64)
    generator = torch.Generator().manual_seed(0)
    for kind, dropped in ((AttentionBlock, heads), (MlpBlock, channels)):
        units = sizes.query_heads if kind is AttentionBlock else sizes.channels
        scores = torch.rand(units, generator=generator)
        kept = targets.keep(block(kind, 3, sizes), scores)
        assert int((~kept).sum()) == dropped
        assert scores[~kept].max() <= scores[kept].min()
        for protected in range(3):
            assert targets.keep(block(kind, protected, sizes), scores).all()


@pytest.mark.parametrize(("layers", "skipped"), [(1, 0), (5, 0), (6, 3), (24, 3)])
def test_shallow_models_have_no_protected_layers(layers, skipped):
    assert Targets.at(shape(layers, 8, 8, 512), 0.25, 64).skipped == skipped


def test_a_ratio_the_unprotected_layers_cannot_give_is_refused():
    with pytest.raises(UsageError):
        Targets.at(shape(6, 8, 8, 512), 0.5, 64)


def test_fusion_element_by_element():
    generator = torch.Generator().manual_seed(0)
    probed = torch.rand(5, 6, generator=generator).double()
    history = torch.rand(5, 6, generator=generator).double()
    probed[0, 0] = history[0, 0] = 0.0
    history[1] = 0.0
    found = fuse(probed, history)
    for s in range(5):
        for c in range(6):
            p, h = probed[s, c].item(), history[s, c].item()
            alpha = p / (p + h + 1e-6)
            assert found[s, c].item() == pytest.approx(alpha * p + (1 - alpha) * h, rel=1e-12)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("units", [4, 24])
def test_closed_form_against_the_weights_spelled_out(units):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(10, 24, generator=generator).double()
    moments = torch.rand(24, generator=generator).double()
    found = ppsp(moments, weight, units)
    torch.testing.assert_close(found, explicit_scores(moments, weight, units))
    theirs = (
        channel_scores(weight.numpy(), moments.numpy())
        if units == 24
        else head_scores(weight.numpy(), moments.numpy(), units)
    )
    torch.testing.assert_close(found, torch.tensor(theirs))


def test_massive_activations_do_not_overflow():
    scores = ppsp(torch.full((4,), 1e20), torch.full((3, 4), 0.1), 2)
    assert torch.isfinite(scores).all()

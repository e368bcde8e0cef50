"""A probe run ahead against the model's own blocks, for every family."""

from __future__ import annotations

import pytest
import torch
from factories import CASES
from probed_models import captured, opened, padded, probed_inputs, run, some_texts

from spp_export.common.errors import ModelError
from spp_export.importance.probe_pruning.blocks import layer_blocks
from spp_export.importance.probe_pruning.probe import Probe, whole

KINDS = ("heads", "channels")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@torch.no_grad()
def test_a_probe_of_all_tokens_gives_what_the_model_gives(case, tmp_path):
    model, family, shape = opened(case.make(tmp_path))
    batch = padded(some_texts([14, 9, 1]))
    real = batch.attention_mask.bool()
    for layer, blocks in enumerate(layer_blocks(model, family, shape)):
        with captured(model, layer) as seen:
            run(model, batch)
        for kind, block in zip(KINDS, blocks, strict=True):
            call = {"position_embeddings": seen["rotary"]}
            found = block.ahead(seen[f"{kind} x"], whole(real), call)
            expected = seen[f"{kind} a"]
            torch.testing.assert_close(found[real], expected[real], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@torch.no_grad()
def test_kept_tokens_attend_among_themselves_at_their_own_positions(case, tmp_path):
    model, family, shape = opened(case.make(tmp_path))
    text = some_texts([16])[0]
    positions = [0, 2, 3, 9, 15]
    probe = Probe(torch.tensor([0]), torch.tensor(positions), torch.ones(1, 5).bool())
    for layer, blocks in enumerate(layer_blocks(model, family, shape)):
        with captured(model, layer) as seen:
            run(model, padded([text]))
        for kind, block in zip(KINDS, blocks, strict=True):
            call = {"position_embeddings": seen["rotary"]}
            found = block.ahead(seen[f"{kind} x"], probe, call)[0]
            expected = probed_inputs(model, layer, seen, kind, positions)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_chosen_samples_and_their_pads(tmp_path):
    """Real tokens of a chosen sample are those of the sample alone."""
    model, family, shape = opened(CASES[3].make(tmp_path))
    texts = some_texts([12, 5, 9])
    with captured(model, 0) as seen:
        run(model, padded(texts))
    positions = torch.tensor([0, 3, 4, 7, 11])
    real = torch.tensor([len(texts[2])])[:, None] > positions[None]
    attention, _ = layer_blocks(model, family, shape)[0]
    call = {"position_embeddings": seen["rotary"]}
    found = attention.ahead(seen["heads x"], Probe(torch.tensor([2]), positions, real), call)
    with captured(model, 0) as alone:
        run(model, padded([texts[2]]))
    expected = probed_inputs(model, 0, alone, "heads", [0, 3, 4, 7])
    torch.testing.assert_close(found[0, :4], expected, rtol=1e-10, atol=1e-10)
    assert torch.isfinite(found).all()


def test_offloaded_weights_are_refused(tmp_path):
    model, family, shape = opened(CASES[0].make(tmp_path))
    model.model.layers[1].mlp.down_proj.to("meta")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj: the weights are offloaded"):
        layer_blocks(model, family, shape)

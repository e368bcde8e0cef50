"""Models run one layer after the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from family_models import KNOWN, load, make_dense, tokens

from spp_export.common.errors import ModelError
from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.models.layer_runs import layer_runs


@pytest.mark.parametrize("name", KNOWN)
def test_every_family_runs_layer_by_layer(name: str, tmp_path: Path):
    """A text with padding behind it, up to the logits."""
    source = open_source(make_dense(name, tmp_path / "dense"))
    family, model, ids = source.family, load(source.path).float(), tokens()
    attends = torch.ones_like(ids)
    attends[0, 7:] = 0
    call = {"input_ids": ids, "attention_mask": attends, "use_cache": False}
    (run,) = layer_runs(model, family, [call])
    streams = []
    with torch.no_grad():
        for index, layer in enumerate(model.get_submodule(family.layers)):
            run.stream = run.written(layer, index)
            streams.append(run.stream)
        norm = model.get_submodule(family.final_norm)
        seen = []
        with norm.register_forward_pre_hook(lambda _, given: seen.append(given[0])):
            model(**call)
    assert len(streams) == source.shape.num_layers
    real = attends.bool()
    assert torch.allclose(streams[-1][real], seen[-1][real], rtol=1e-4, atol=1e-5)


def test_layers_that_do_not_run_alone_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As where what a layer writes depends on how often it was called."""
    source = open_source(make_dense("llama", tmp_path / "dense"))
    model, ids = load(source.path).float(), tokens()
    layer = model.get_submodule(source.family.layers)[1]
    plain, calls = layer.forward, []

    def counting(*given, **named):
        calls.append(1)
        return plain(*given, **named) * len(calls)

    monkeypatch.setattr(layer, "forward", counting)
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    with pytest.raises(ModelError, match=r"the layers of llama models do not run one by one"):
        layer_runs(model, source.family, [call])

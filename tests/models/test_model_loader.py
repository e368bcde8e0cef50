"""Loading slim and dense directories, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from factories import (
    make_checkpoint,
    mask_in_torch,
    random_layers,
    shape_of,
    uniform_layers,
    write_slim,
)
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from spp_export.common.errors import CheckpointError, ModelError
from spp_export.models.loader import load_dense, load_slim
from spp_export.models.modeling import SppLlamaForCausalLM

IDS = torch.arange(3, 26)[None]
TENSOR = "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    return make_checkpoint(folder, "llama", kv_heads=4, query_heads=8, shards=3, dtype="bfloat16")


@pytest.fixture(scope="module")
def slim(dense):
    return write_slim(dense.parent / "slim", dense, random_layers(shape_of(dense), 0))


@pytest.fixture
def damaged(slim, tmp_path):
    """Writes the slim checkpoint with other tensors or another config."""

    def write(tensors=None, **config):
        target = tmp_path / "damaged"
        shutil.copytree(slim, target)
        if tensors is not None:
            save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        settings = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**settings, **config}))
        return target

    return write


def test_slim_and_dense_keep_the_stored_type_and_evaluate(dense, slim):
    for model, kind in (
        (load_slim(slim), SppLlamaForCausalLM),
        (load_dense(dense), LlamaForCausalLM),
    ):
        assert type(model) is kind
        assert model.dtype == torch.bfloat16
        assert not model.training


@pytest.mark.parametrize("dtype", [torch.float64, "float32"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_type_and_attention_can_be_chosen(slim, dtype, attention):
    model = load_slim(slim, dtype, attn_implementation=attention)
    assert str(model.dtype).removeprefix("torch.") == str(dtype).removeprefix("torch.")
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("device", ["auto", torch.device("cpu")])
def test_devices(slim, device):
    assert load_slim(slim, device=device).device.type in ("cpu", "cuda")


def test_uniform_loads_with_the_stock_class_and_equals_the_masked_dense_model(dense, tmp_path):
    layers = uniform_layers(shape_of(dense), 3, kv_heads=2, group_size=2, channels=40)
    model = load_slim(write_slim(tmp_path / "slim", dense, layers, "uniform"), torch.float64)
    assert type(model) is LlamaForCausalLM
    with torch.no_grad(), mask_in_torch(load_dense(dense, torch.float64), layers) as masked:
        assert (model(IDS).logits - masked(IDS).logits).abs().max().item() == 0.0


def test_buffers_of_old_checkpoints_are_passed_over(slim, damaged):
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    load_slim(damaged({**load_file(slim / "model.safetensors"), **buffer}))


def test_a_missing_tensor_is_not_made_up(slim, damaged):
    tensors = load_file(slim / "model.safetensors")
    del tensors[TENSOR]
    with pytest.raises(CheckpointError, match=rf"tensor '{TENSOR}' is missing"):
        load_slim(damaged(tensors))


def test_an_extra_tensor_is_not_left_out(slim, damaged):
    extra = {"model.layers.0.self_attn.o_proj.bias": torch.ones(64), "zebra": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"o_proj.bias' \(and 1 more\) is not of"):
        load_slim(damaged({**load_file(slim / "model.safetensors"), **extra}))


def test_a_wrong_shape_names_its_tensor(slim, damaged):
    tensors = load_file(slim / "model.safetensors")
    tensors[TENSOR] = tensors[TENSOR].new_ones(64, 4096)
    with pytest.raises(CheckpointError, match=rf"'{TENSOR}' has shape \[64, 4096\]"):
        load_slim(damaged(tensors))


def test_a_damaged_file_is_one_line(damaged):
    target = damaged()
    (target / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="too few for a safetensors file") as caught:
        load_slim(target)
    assert "\n" not in str(caught.value)


def test_a_config_that_transformers_refuses_is_one_line(damaged):
    with pytest.raises(CheckpointError, match="cannot be loaded: ") as caught:
        load_slim(damaged(hidden_act="none of these"))
    assert "\n" not in str(caught.value)


def test_remote_code_is_never_run(damaged):
    target = damaged(auto_map={"AutoConfig": "evil.X", "AutoModelForCausalLM": "evil.Y"})
    (target / "evil.py").write_text("raise SystemExit('remote code ran')")
    assert type(load_slim(target)) is SppLlamaForCausalLM


def test_what_is_no_model_of_ours_is_an_error(slim, damaged, tmp_path):
    with pytest.raises(ModelError, match=r"config.json: no such file"):
        load_slim(tmp_path)
    with pytest.raises(ModelError, match="already differ"):
        load_dense(slim)
    target = damaged(model_type="bert")
    with pytest.raises(ModelError, match="'bert' with per_layer_config is not supported"):
        load_slim(target)
    (target / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="expected a JSON object"):
        load_slim(target)

from __future__ import annotations

import json

import pytest
import torch
from dense_models import CONFIGS, config_of, random_tensors, write_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from spp_export.common.errors import CheckpointError, ModelError, SppError
from spp_export.models.checkpoint.checkpoint import open_source


def model(directory, family="llama", *, shards=1, dtype=torch.float32, edit=None, **config):
    config = config_of(family, **config)
    tensors = random_tensors(config, dtype)
    if edit:
        edit(tensors)
    return write_model(directory, config, tensors, shards)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("tied", [True, False])
def test_opens_what_transformers_saves(tmp_path, family, tied):
    config = AutoConfig.for_model(**config_of(family, tie_word_embeddings=tied))
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    dense.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    assert (tmp_path / "m" / "model.safetensors.index.json").exists()
    source = open_source(tmp_path / "m")
    expected = dict(dense.state_dict())
    if tied:
        del expected["lm_head.weight"]
    assert {name: t.shape for name, t in source.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in expected.items()
    }
    assert source.shape.parameters(source.shape.layers) == sum(
        parameter.numel() for parameter in dense.parameters()
    )
    assert (source.name, source.dtype_name, source.shape.element_bytes) == ("m", "bfloat16", 2)
    assert source.family.model_type == config.model_type


def test_tensors_come_in_family_order(tmp_path):
    source = open_source(model(tmp_path, shards=4))
    specs = source.family.tensors(source.shape, source.shape.layers)
    assert list(source.tensors) == [spec.name for spec in specs]


def test_fingerprint_sees_the_model_and_not_how_it_was_saved(tmp_path):
    first = open_source(model(tmp_path / "a")).fingerprint
    saved_again = model(
        tmp_path / "b",
        shards=3,
        transformers_version="9",
        _name_or_path="/x",
        torch_dtype="float32",
    )
    assert open_source(saved_again).fingerprint == first
    others = [
        model(tmp_path / "c", dtype=torch.bfloat16),
        model(tmp_path / "d", rope_theta=5.0),
        model(tmp_path / "e", vocab_size=65),
        model(tmp_path / "f", attention_bias=True),
    ]
    prints = {open_source(other).fingerprint for other in others}
    assert len(prints | {first}) == 5


def copy_head(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def test_a_stored_copy_of_a_tied_head_is_one_tensor(tmp_path):
    source = open_source(model(tmp_path / "a", "qwen2", edit=copy_head))
    assert "lm_head.weight" not in source.tensors
    assert source.fingerprint == open_source(model(tmp_path / "b", "qwen2")).fingerprint


def test_a_tied_head_that_differs(tmp_path):
    def edit(tensors):
        copy_head(tensors)
        tensors["lm_head.weight"][63, 31] += 1

    with pytest.raises(CheckpointError, match=r"'lm_head.weight' differs from"):
        open_source(model(tmp_path, "qwen2", edit=edit))


def test_obsolete_buffers_are_left_out(tmp_path):
    def edit(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)

    source = open_source(model(tmp_path, edit=edit))
    assert not any("inv_freq" in name for name in source.tensors)


def rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


REFUSED = {
    "missing": ({"edit": lambda t: t.pop("model.norm.weight")}, "'model.norm.weight' is missing"),
    "several missing": (
        {"edit": lambda t: [t.pop(n) for n in list(t) if "layers.1" in n]},
        " and 6 more are missing",
    ),
    "unknown": ({"edit": lambda t: t.update(new=torch.ones(1))}, "'new' is unknown"),
    "bias that the config denies": (
        {"edit": lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)})},
        "q_proj.bias' is unknown",
    ),
    "missing and unknown": ({"edit": rename("model.norm.weight", "norm")}, "is missing"),
    "head missing": ({"edit": lambda t: t.pop("lm_head.weight")}, "tie_word_embeddings"),
    "wrong shape": (
        {"edit": lambda t: t.update({"model.norm.weight": torch.ones(31)})},
        "'model.norm.weight' has shape [31], expected [32]",
    ),
    "transposed": (
        {"edit": lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(32, 40)})},
        "has shape [32, 40], expected [40, 32]",
    ),
    "integers": (
        {"edit": lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})},
        "'model.norm.weight' is I8",
    ),
    "too few layers stored": ({"num_hidden_layers": 4000}, "4000 layers"),
    "unknown family": ({"model_type": "gpt2"}, "gpt2"),
    "quantised": ({"quantization_config": {}}, "quantised"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    arguments, message = dict(REFUSED[case][0]), REFUSED[case][1]
    directory = model(tmp_path, edit=arguments.pop("edit", None))
    (tmp_path / "config.json").write_text(json.dumps(config_of("llama", **arguments)))
    with pytest.raises(ModelError) as caught:
        open_source(directory)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"",
        b"{",
        b'{"model_type": "\xff"}',
        b'{"a":' * 100_000,
        b'{"model_type":["llama"]}',
        b'{"model_type":"llama","hidden_size":"32"}',
        b" " * (17 << 20),
    ],
)
def test_damaged_config(tmp_path, content):
    model(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError) as caught:
        open_source(tmp_path)
    assert "config" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_directory_and_no_config(tmp_path):
    with pytest.raises(SppError, match="expected a model directory"):
        open_source(tmp_path / "none")
    with pytest.raises(SppError, match=r"config\.json: no such file"):
        open_source(tmp_path)


def test_mixed_float_dtypes_are_kept(tmp_path):
    def edit(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].double()

    source = open_source(model(tmp_path, dtype=torch.float16, edit=edit))
    assert source.tensors["model.norm.weight"].dtype == "F64"
    assert source.dtype == "F16"
    assert load_file(tmp_path / "model.safetensors")["model.norm.weight"].dtype == torch.float64


def test_names_are_never_paths(tmp_path, monkeypatch):
    directory = model(tmp_path / "my-model")
    assert open_source(directory).name == "my-model"
    assert open_source(directory, "org/name").name == "org/name"
    assert open_source(directory, str(directory)).name == "my-model"
    assert open_source(directory, "C:\\models\\x").name == "my-model"
    monkeypatch.chdir(directory)
    assert open_source(directory.relative_to(directory), ".").name == "my-model"
    cached = model(tmp_path / "models--org--name" / "snapshots" / "0123")
    assert open_source(cached).name == "org/name"

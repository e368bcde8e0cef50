"""The file itself, read by the gguf package: names, shapes, types, and every weight."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from factories import random_layers, read_config, shape_of, write_slim
from gguf_cases import make
from safetensors.numpy import load_file

from spp_export.common.errors import CheckpointError, UsageError
from spp_export.formats.gguf import GgufOptions
from spp_export.formats.gguf.contents import gguf_contents
from spp_export.formats.gguf.encode import allowed_error, decode, encode
from spp_export.formats.gguf.options import QUANTS
from spp_export.formats.gguf.write import write_gguf
from spp_export.models.checkpoint.checkpoint import open_checkpoint


def read(checkpoint: Path, options: GgufOptions = GgufOptions()) -> gguf.GGUFReader:  # noqa: B008
    decoder = open_checkpoint(checkpoint)
    out = checkpoint / "gguf"
    out.mkdir(exist_ok=True)
    write_gguf(decoder, gguf_contents(decoder, options, "tiny"), out)
    return gguf.GGUFReader(out / "model.gguf")


def values(reader: gguf.GGUFReader) -> dict[str, np.ndarray]:
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


def to_pairs(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of each head by the definition: place 2i is i, place 2i + 1 is i + head_dim / 2."""
    order = [
        head + half * head_dim // 2 + i
        for head in range(0, len(weight), head_dim)
        for i in range(head_dim // 2)
        for half in (0, 1)
    ]
    return weight[order]


def test_every_weight_of_a_per_layer_qwen2(tmp_path: Path) -> None:
    """With biases; q and k and theirs reordered by the layer's own heads."""
    dense = make("qwen2-gqa-tied", tmp_path)
    slim = write_slim(tmp_path / "slim", dense, random_layers(shape_of(dense), 3))
    stored, found = load_file(slim / "model.safetensors"), values(read(slim))
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    wanted = {
        "token_embd.weight": stored.pop("model.embed_tokens.weight"),
        "output_norm.weight": stored.pop("model.norm.weight"),
    }
    for name, tensor in stored.items():
        _, _, index, rest = name.split(".", 3)
        module, _, kind = rest.rpartition(".")
        turned = to_pairs(tensor, 16) if module.endswith(("q_proj", "k_proj")) else tensor
        wanted[f"blk.{index}.{names[module]}.{kind}"] = turned
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


def test_qwen3_layers_that_differ_have_one_matrix_for_queries_keys_and_values(
    tmp_path: Path,
) -> None:
    dense = make("qwen3-gqa-tied", tmp_path)
    slim = write_slim(tmp_path / "slim", dense, random_layers(shape_of(dense), 3))
    stored, found = load_file(slim / "model.safetensors"), values(read(slim))
    for index in range(3):
        parts = [
            stored[f"model.layers.{index}.self_attn.{part}_proj.weight"] for part in ("q", "k", "v")
        ]
        np.testing.assert_array_equal(found[f"blk.{index}.attn_qkv.weight"], np.concatenate(parts))
    assert "output.weight" not in found


def test_metadata_of_layers_that_differ(tmp_path: Path) -> None:
    dense = make("llama-gqa-bias", tmp_path)
    slim = write_slim(tmp_path / "slim", dense, random_layers(shape_of(dense), 3))
    config, reader = read_config(slim), read(slim)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    layers = [config["per_layer_config"][str(i)] for i in range(3)]
    for key, name in (
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("feed_forward_length", "intermediate_size"),
    ):
        assert fields[f"deci.{key}"] == [layer[name] for layer in layers]
    assert (fields["deci.attention.key_length"], fields["deci.rope.dimension_count"]) == (16, 16)
    assert (fields["deci.block_count"], fields["deci.context_length"]) == (3, 1024)
    assert fields["general.name"] == "tiny"
    # The definition of Llama 3's scaling: long waves are slowed by the factor, short ones kept.
    factors = values(reader)["rope_freqs.weight"]
    turns = 64 * 500.0 ** (-np.arange(0, 16, 2) / 16) / (2 * np.pi)
    assert np.allclose(factors[turns > 4], 1)
    assert np.allclose(factors[turns < 1], 4)


@pytest.mark.parametrize("quant", QUANTS)
def test_rows_that_are_no_multiple_of_a_block_stay_at_half_precision(quant, tmp_path: Path) -> None:
    dense = make("llama-mqa", tmp_path, channels=72)
    decoder = open_checkpoint(dense)
    contents = gguf_contents(decoder, GgufOptions(quant=quant), "tiny")
    tensors = read(dense, GgufOptions(quant=quant)).tensors
    types = {tensor.name: tensor.tensor_type.name.lower() for tensor in tensors}
    down = [f"blk.{i}.ffn_down.weight" for i in range(3)]
    assert contents.summary()["not_quantised"] == down
    assert [types[name] for name in down] == ["f16"] * 3
    assert types["token_embd.weight"] == types["output.weight"] == "q8_0"
    assert types["blk.0.attn_q.weight"] == types["blk.2.ffn_up.weight"] == quant
    assert types["blk.0.attn_norm.weight"] == types["output_norm.weight"] == "f32"


@pytest.mark.parametrize(
    ("stored", "kind"), [("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")]
)
def test_without_a_precision_values_are_as_stored(stored: str, kind: str, tmp_path: Path) -> None:
    dense = make("mistral-gqa", tmp_path, dtype=stored)
    reader = read(dense)
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == kind
    assert types["blk.0.ffn_norm.weight"] == "F32"


def test_the_same_bytes_twice(tmp_path: Path) -> None:
    dense = make("qwen3-gqa-tied", tmp_path)
    read(dense)
    first = (dense / "gguf" / "model.gguf").read_bytes()
    read(dense)
    assert (dense / "gguf" / "model.gguf").read_bytes() == first


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 3000.0])
def test_quantised_values_are_as_near_as_allowed(quant, scale: float) -> None:
    rng = np.random.default_rng(0)
    rows = (rng.standard_t(3, (40, 96)) * scale).astype(np.float32)
    rows[3] = 0
    rows[4] = scale
    rows[5] = -np.abs(rows[5])
    found = decode(encode(rows, quant, "x"), 96, quant)
    error, allowed = np.abs(found - rows), allowed_error(rows, quant)
    assert (error <= allowed).all()
    if scale >= 1:  # and not by far more than need be
        assert (error / allowed).max() > 0.4


@pytest.mark.parametrize("quant", QUANTS)
def test_other_weights_are_farther_than_allowed(quant) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, 96)).astype(np.float32)
    other = decode(encode(rows[::-1].copy(), quant, "x"), 96, quant)
    assert (np.abs(other - rows) > allowed_error(rows, quant)).mean() > 0.3


def test_a_value_too_large_for_half_precision() -> None:
    rows = np.full((1, 32), 1e6, np.float32)
    with pytest.raises(CheckpointError, match="tensor x has a value too large for f16"):
        encode(rows, "f16", "tensor x")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (GgufOptions("fp8"), "--precision fp8: expected one of fp32"),
        (GgufOptions(quant="q3_k"), "--quant q3_k: expected one of q8_0"),
        (GgufOptions("fp16", "q8_0"), "--precision fp16: --quant q8_0 decides"),
    ],
)
def test_forms_that_cannot_be(options: GgufOptions, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        options.check()

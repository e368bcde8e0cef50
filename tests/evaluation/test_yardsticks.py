"""The dense model in fewer bits: what is rounded, how, and of which models nothing is said."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from factories import make_checkpoint, read_config
from safetensors.torch import load_file, save_file

from spp_export.evaluation.harness.planner import RowOpener
from spp_export.evaluation.harness.rows import standard_rows
from spp_export.evaluation.harness.yardsticks import quantised_bits, yardsticks
from spp_export.formats.gguf.encode import rounded
from spp_export.models.session import open_session

KINDS = {"int8": "q8_0", "int4": "q4_0"}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    root = tmp_path_factory.mktemp("yardsticks")
    return make_checkpoint(root, "qwen2", kv_heads=2, query_heads=4)


def opener(session):
    roundings = {name: partial(rounded, kind=kind) for name, kind in KINDS.items()}
    return RowOpener(session, None, {}, (), roundings)


def row(name):
    (found,) = standard_rows([], [], yardsticks=[name])[1:]
    assert (found.kind, found.label) == ("yardstick", f"dense in {name}")
    return found


def by_definition(weight, levels):
    """Blocks of 32 along the inputs with one scale: the furthest value is -8 in 4 bits and, in 8
    bits, 127 or -127."""
    blocks = weight.reshape(-1, 32)
    furthest = blocks[np.arange(len(blocks)), np.abs(blocks).argmax(1)][:, None]
    scale = furthest / -8 if levels == 4 else np.abs(furthest) / 127
    codes = np.round(blocks / scale)
    codes = codes.clip(-8, 7) if levels == 4 else codes
    return (codes * scale.astype(np.float16)).reshape(weight.shape)


@pytest.mark.parametrize(("name", "levels"), [("int8", 8), ("int4", 4)])
def test_projections_are_rounded_and_put_back(dense, name, levels):
    session = open_session(str(dense))
    before = {key: value.clone() for key, value in session.model.state_dict().items()}
    opened = opener(session).open(row(name))
    assert opened.realised == {"keep": 1.0}
    with opened.opened() as model:
        for key, value in model.state_dict().items():
            if not any(f"{part}.weight" in key for part in PROJECTIONS):
                assert torch.equal(value, before[key]), key
                continue
            step = np.abs(before[key].numpy()).max() / (127 if levels == 8 else 8)
            expected = by_definition(before[key].numpy(), levels)
            off = np.abs(value.numpy() - expected)
            # Ties and the scale's own rounding may fall the other way.
            assert (off > 1e-3 * step).mean() < 0.01
            assert off.max() < 1.01 * step
            assert not torch.equal(value, before[key])
    assert all(torch.equal(value, before[key]) for key, value in session.model.state_dict().items())


def test_half_precision_is_computed_in_it(dense):
    session = open_session(str(dense))
    with opener(session).open(row("bf16")).opened() as model:
        assert model.dtype == torch.bfloat16
        assert model.config.num_hidden_layers == read_config(dense)["num_hidden_layers"]
    assert session.model.dtype == torch.float32


def test_rows_that_are_no_whole_blocks_are_filled_up():
    weight = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)
    found = rounded(weight, "q8_0")
    assert found.shape == (3, 40)
    assert np.abs(found - weight).max() < 0.02
    assert np.array_equal(found[:, :32], rounded(weight[:, :32], "q8_0"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_were_in_few_bits_are_known(tmp_path, dtype):
    path = make_checkpoint(tmp_path, "llama", kv_heads=2, query_heads=4, dtype=dtype)
    session = open_session(str(path))
    assert quantised_bits(session.source) is None
    assert yardsticks(session) == ("bf16", "int8", "int4")
    assert yardsticks(open_session(str(path), dtype="bfloat16")) == ("int8", "int4")
    for name, value in (tensors := load_file(path / "model.safetensors")).items():
        if "proj" in name:
            few = rounded(value.float().numpy(), "q4_0").copy()
            tensors[name] = torch.from_numpy(few).to(value.dtype)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    session = open_session(str(path))
    assert quantised_bits(session.source) == 4
    assert yardsticks(session) == ("bf16",)


def test_rows_too_narrow_for_a_group_tell_nothing(tmp_path):
    path = make_checkpoint(tmp_path, "llama", kv_heads=1, query_heads=1, hidden=16, head_dim=8)
    assert quantised_bits(open_session(str(path)).source) is None

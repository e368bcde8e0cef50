from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch
from dense_models import config_of, random_tensors, write_model
from safetensors.torch import save_file

from spp_export.common.errors import CheckpointError
from spp_export.models.checkpoint.reader import (
    as_array,
    blocks,
    model_file,
    read,
    read_float,
    stored_tensors,
)

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path):
    config = config_of("llama")
    return write_model(tmp_path / "model", config, random_tensors(config), shards=3)


def edit_index(directory, change):
    index = json.loads((directory / INDEX).read_text())
    change(index)
    (directory / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 3])
def test_finds_every_tensor(tmp_path, shards):
    tensors = random_tensors(config_of("qwen2"), torch.bfloat16)
    found = stored_tensors(write_model(tmp_path / "m", config_of("qwen2"), tensors, shards))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(as_array(found[name]), tensor.view(torch.uint16).numpy())
        np.testing.assert_array_equal(read_float(found[name]), tensor.float().numpy())
        assert bytes(read(found[name])) == tensor.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("block_bytes", [1, 100, 128, 1 << 20])
def test_blocks_are_whole_rows_in_order(tmp_path, block_bytes):
    tensor = torch.arange(7 * 10, dtype=torch.float32).reshape(7, 10)
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    stored = stored_tensors(tmp_path)["a"]
    parts = [block.view("<f4") for block in blocks(stored, block_bytes)]
    np.testing.assert_array_equal(np.concatenate(parts), tensor.numpy())
    assert all(part.nbytes <= max(block_bytes, 40) for part in parts)


def test_single_file_wins_over_an_index(sharded):
    save_file({"only": torch.ones(1)}, sharded / "model.safetensors")
    assert stored_tensors(sharded).keys() == {"only"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(tmp_path, bad):
    tensor = torch.ones(8, 4)
    tensor[5, 1] = bad
    save_file({"some.weight": tensor}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'some.weight' has a value that is not finite"):
        as_array(stored_tensors(tmp_path)["some.weight"])


def test_file_cut_short_after_its_header_was_read(tmp_path):
    save_file({"a": torch.ones(1000)}, tmp_path / "model.safetensors")
    stored = stored_tensors(tmp_path)["a"]
    os.truncate(tmp_path / "model.safetensors", 2000)
    with pytest.raises(
        CheckpointError, match="has changed since its header was read, at tensor 'a'"
    ):
        as_array(stored)


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\0b", "..\\x"],
)
def test_index_with_a_path_for_a_file_name(sharded, name):
    edit_index(sharded, lambda index: index["weight_map"].update({"lm_head.weight": name}))
    with pytest.raises(CheckpointError, match="plain file name"):
        stored_tensors(sharded)


INDEX_DAMAGE = {
    "no weight_map": (lambda index: index.pop("weight_map"), "weight_map"),
    "empty weight_map": (lambda index: index["weight_map"].clear(), "weight_map"),
    "list": (lambda index: index.update(weight_map=[]), "weight_map"),
    "number": (lambda index: index["weight_map"].update(x=3), "'x': expected a file name"),
    "no such file": (
        lambda index: index["weight_map"].update(x="none.safetensors"),
        "no such file",
    ),
    "tensor not in its file": (
        lambda index: index["weight_map"].update(x="model-00001-of-00003.safetensors"),
        "'x' should be in model-00001-of-00003.safetensors",
    ),
    "tensor not in the index": (
        lambda index: index["weight_map"].pop("lm_head.weight"),
        "'lm_head.weight' is in",
    ),
}


@pytest.mark.parametrize("case", INDEX_DAMAGE)
def test_damaged_index(sharded, case):
    change, message = INDEX_DAMAGE[case]
    edit_index(sharded, change)
    with pytest.raises(CheckpointError) as caught:
        stored_tensors(sharded)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tensor_in_two_files(sharded):
    first = "model-00001-of-00003.safetensors"
    shutil.copy(sharded / first, sharded / "again.safetensors")
    edit_index(sharded, lambda index: index["weight_map"].update({"x": "again.safetensors"}))
    with pytest.raises(CheckpointError, match=r"again\.safetensors"):
        stored_tensors(sharded)


def test_links(tmp_path, sharded):
    outside = tmp_path / "elsewhere"
    (sharded / "config.json").rename(outside)
    (sharded / "config.json").symlink_to(outside)
    with pytest.raises(CheckpointError, match="leads out of the model's directory"):
        model_file(sharded, "config.json")
    (sharded / "inside.json").symlink_to(INDEX)
    assert model_file(sharded, "inside.json") == (sharded / INDEX).resolve()
    (sharded / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError):
        model_file(sharded, "loop")
    (sharded / "dangling").symlink_to("nothing")
    with pytest.raises(CheckpointError, match="no such file"):
        model_file(sharded, "dangling")


def test_hub_cache_links_are_followed_and_no_others(tmp_path, sharded):
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(sharded.iterdir())):
        file.rename(repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert "lm_head.weight" in stored_tensors(snapshot)
    (tmp_path / "secret").write_text("x")
    (snapshot / "stolen").symlink_to("../../../secret")
    with pytest.raises(CheckpointError, match="leads out"):
        model_file(snapshot, "stolen")


def test_files_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="expected a regular file"):
        stored_tensors(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="expected a regular file"):
        stored_tensors(tmp_path)


def test_directories_without_safetensors(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors"):
        stored_tensors(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="save_pretrained"):
        stored_tensors(tmp_path)
    with pytest.raises(CheckpointError, match="no such directory"):
        stored_tensors(tmp_path / "none")

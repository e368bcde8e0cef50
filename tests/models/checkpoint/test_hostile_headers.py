"""Safetensors files made to cost memory or time, or that change while they are read."""

from __future__ import annotations

import json
import os
import struct
import threading

import pytest
import torch
from bounded import counted_calls, refused
from dense_models import config_of, random_tensors, write_model
from safetensors.torch import save_file

from spp_export.common.errors import CheckpointError
from spp_export.models.checkpoint.checkpoint import open_source
from spp_export.models.checkpoint.header import MAX_HEADER_BYTES, MAX_TENSORS, read_header
from spp_export.models.checkpoint.reader import as_array, blocks, require_unchanged, stored_tensors

MEGABYTE = 1 << 20
WEIGHTS = "model.safetensors"


def sparse(path, claimed, size, start=b"{"):
    """A file of `size` bytes, of which hardly one is on the disk, that claims so long a header."""
    with path.open("wb") as file:
        file.write(struct.pack("<Q", claimed) + start)
        file.truncate(size)


@pytest.mark.parametrize(
    ("claimed", "size", "match"),
    [
        ((1 << 64) - 1, 100, "claims 18446744073709551615 bytes, at most"),
        (1 << 63, 1 << 40, "claims 9223372036854775808 bytes, at most"),
        (100 * MEGABYTE, 101 * MEGABYTE, "claims 104857600 bytes, at most"),
        (MAX_HEADER_BYTES + 1, 1 << 40, "claims 16777217 bytes, at most"),
        (MAX_HEADER_BYTES, 100, "claims 16777216 bytes, the file has 100"),
    ],
)
def test_a_header_that_is_too_long_is_not_read(tmp_path, claimed, size, match):
    sparse(tmp_path / WEIGHTS, claimed, size)
    with refused(CheckpointError, match, megabytes=1, calls=1000):
        read_header(tmp_path / WEIGHTS)


def header_file(path, text: bytes, data: int = 0):
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))


def entries(count, dtype="U8", shape="[0]", end=0):
    text = ",".join(
        f'"{n}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,{end}]}}'
        for n in range(count)
    )
    return f"{{{text}}}".encode()


# Headers of nearly the largest size whose values would take a hundred times their text.
DENSE_HEADERS = {
    "lists": b'{"a":[' + b"[]," * 5_000_000 + b"[]]}",
    "objects": b'{"a":[' + b"{}," * 5_000_000 + b"{}]}",
    "keys": b"{" + b",".join(b'"%d":1' % n for n in range(1_300_000)) + b"}",
    "metadata": b'{"__metadata__":{' + b",".join(b'"%d":""' % n for n in range(1_200_000)) + b"}}",
}


@pytest.mark.parametrize("kind", DENSE_HEADERS)
def test_headers_that_would_unfold(tmp_path, kind):
    header_file(tmp_path / WEIGHTS, DENSE_HEADERS[kind])
    with refused(CheckpointError, "the header is of more than 100000 tensors", megabytes=48):
        read_header(tmp_path / WEIGHTS)


def test_one_tensor_too_many(tmp_path):
    header_file(tmp_path / WEIGHTS, entries(MAX_TENSORS + 1))
    with pytest.raises(CheckpointError, match="of more than 100000 tensors"):
        read_header(tmp_path / WEIGHTS)


def test_an_index_of_too_many_tensors(tmp_path):
    names = dict.fromkeys(map(str, range(MAX_TENSORS + 1)), "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match="names 100001 tensors, at most 100000"):
        stored_tensors(tmp_path)


def test_an_index_of_many_files_takes_linear_time(tmp_path):
    for number in range(800):
        text = f'{{"t{number}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}}}'.encode()
        header_file(tmp_path / f"{number}.safetensors", text)

    def calls_for(files):
        weight_map = {f"t{n}": f"{n}.safetensors" for n in range(files)}
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        with counted_calls() as calls:
            assert len(stored_tensors(tmp_path)) == files
        return calls.count

    calls_for(1)  # what is imported or cached at the first call
    assert calls_for(800) < 4.4 * calls_for(200)


OVERFLOWS = {
    "product": ("U8", [1 << 40] * 8, 0, "takes 2"),
    "product that wraps to nothing": ("U8", [1 << 32, 1 << 32], 0, "takes 18446744073709551616"),
    "product that wraps to the data": ("F32", [1 << 31, 1 << 31, 4], 16, "takes 7"),
    "side": ("U8", [1 << 48], 0, "shape must be"),
    "negative": ("U8", [-1, -1], 1, "shape must be"),
    "many digits": ("U8", [10**400], 0, "shape must be"),
    "minus nothing": ("U8", [-0.0], 0, "shape must be"),
}


@pytest.mark.parametrize("kind", OVERFLOWS)
def test_sizes_that_other_integers_could_not_hold(tmp_path, kind):
    dtype, shape, end, match = OVERFLOWS[kind]
    header_file(tmp_path / WEIGHTS, entries(1, dtype, json.dumps(shape), end), end)
    with refused(CheckpointError, match):
        read_header(tmp_path / WEIGHTS)


def test_nothing_of_many_rows_is_read_at_once(tmp_path):
    """No element, but 2^47 rows of none."""
    header_file(tmp_path / WEIGHTS, entries(1, "F32", f"[{1 << 47},0]"))
    tensor = read_header(tmp_path / WEIGHTS)["0"]
    assert list(blocks(tensor)) == []
    assert as_array(tensor).size == 0


def test_no_tensor_of_a_model_is_empty(tmp_path):
    config = config_of("llama")
    tensors = random_tensors(config) | {"model.norm.weight": torch.ones(0)}
    write_model(tmp_path, config, tensors)
    with refused(CheckpointError, r"'model.norm.weight' has shape \[0\], expected \[32\]"):
        open_source(tmp_path)


def test_a_file_as_large_as_it_claims_that_is_not_there(tmp_path):
    """Sparse files make any shape true; nothing of it is read before it is compared."""
    rows = 1 << 30
    text = entries(1, "F32", f"[{rows},1024]", rows * 4096).replace(b'"0"', b'"lm_head.weight"')
    header_file(tmp_path / WEIGHTS, text)
    os.truncate(tmp_path / WEIGHTS, 8 + len(text) + rows * 4096)
    (tmp_path / "config.json").write_text(json.dumps(config_of("llama", num_hidden_layers=1)))
    with refused(CheckpointError, "are missing"):
        open_source(tmp_path)


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null"])
def test_devices(name):
    with refused(CheckpointError, "expected a regular file", calls=1000):
        read_header(os.path.realpath(name))


def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / WEIGHTS)
    with refused(CheckpointError, "expected a regular file", calls=1000):
        read_header(tmp_path / WEIGHTS)


@pytest.fixture
def stored(tmp_path):
    save_file({"a": torch.arange(1000.0), "b": torch.ones(10)}, tmp_path / WEIGHTS)
    return stored_tensors(tmp_path)


def grow(path):
    with path.open("ab") as file:
        file.write(b"x")


def cut(path):
    os.truncate(path, 2000)


def rewrite(path):
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(0, 0))


def replace(path):
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


def to_pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("change", [grow, cut, rewrite, replace, to_pipe], ids=lambda f: f.__name__)
def test_a_file_that_changes_after_its_header_was_read(tmp_path, stored, change):
    change(tmp_path / WEIGHTS)
    with refused(CheckpointError, "has changed since its header was read"):
        as_array(stored["a"])
    with refused(CheckpointError, "has changed since its header was read"):
        require_unchanged(stored.values())


def test_a_file_that_goes_away(tmp_path, stored):
    (tmp_path / WEIGHTS).unlink()
    with refused(CheckpointError, "cannot be read"):
        as_array(stored["a"])


def test_a_file_that_changes_between_two_blocks(tmp_path, stored):
    """By the time the last block is there, all of them are of one state of the file, or refused."""
    parts = blocks(stored["a"], block_bytes=400)
    next(parts)
    grow(tmp_path / WEIGHTS)
    with refused(CheckpointError, "has changed since its header was read"):
        list(parts)


def test_cut_short_under_way_the_process_lives(tmp_path):
    """Mapped memory would end it with SIGBUS."""
    save_file({"a": torch.ones(1 << 22)}, tmp_path / WEIGHTS)
    tensor = stored_tensors(tmp_path)["a"]
    parts = blocks(tensor, block_bytes=1 << 16)
    next(parts)
    cutter = threading.Thread(target=os.truncate, args=(tmp_path / WEIGHTS, 100_000))
    cutter.start()
    cutter.join()
    with refused(CheckpointError, "ends inside tensor 'a'"):
        list(parts)

from __future__ import annotations

import errno
import hashlib
import json
import threading
from io import FileIO
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from spp_export.common.errors import OutputError, UsageError
from spp_export.models.checkpoint import writer as writer_module
from spp_export.models.checkpoint.dtypes import ELEMENT_BYTES, FLOAT_DTYPES, bits_dtype
from spp_export.models.checkpoint.reader import as_array, stored_tensors
from spp_export.models.checkpoint.writer import ShardWriter, TensorEntry, plan_shards

ENTRIES = [
    TensorEntry("a", "BF16", (3, 5)),
    TensorEntry("b", "F32", (7,)),
    TensorEntry("c", "F16", (1, 1)),
    TensorEntry("d", "F64", (4, 2)),
    TensorEntry("e é", "BF16", (6, 6)),
]


def random_bits(entry, seed=0):
    random = np.random.default_rng([seed, len(entry.name), *entry.shape])
    size = 8 * ELEMENT_BYTES[entry.dtype]
    bits = random.integers(0, 1 << (size - 2), entry.shape, dtype=bits_dtype(entry.dtype))
    return bits.copy()


def write(directory, entries=ENTRIES, max_shard_bytes=10**9, kept=True):
    with ShardWriter(directory, plan_shards(entries, max_shard_bytes), kept=kept) as writer:
        for entry in writer.order:
            writer.write(entry.name, [random_bits(entry)])
    return writer


def check_with_library(directory, files):
    found = {}
    for file in files:
        found |= load_file(directory / file)
        with safe_open(directory / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert found.keys() == {entry.name for entry in ENTRIES}
    for entry in ENTRIES:
        tensor = found[entry.name]
        assert tensor.dtype == getattr(torch, FLOAT_DTYPES[entry.dtype])
        raw = tensor.reshape(-1).view(torch.uint8).numpy()
        np.testing.assert_array_equal(raw, random_bits(entry).reshape(-1).view(np.uint8))


@pytest.mark.parametrize("max_shard_bytes", [10**9, 64])
def test_what_is_not_kept_has_the_same_bytes_and_is_not_flushed(
    max_shard_bytes, tmp_path, monkeypatch
):
    (tmp_path / "kept").mkdir()
    (tmp_path / "thrown away").mkdir()
    written = write(tmp_path / "kept", max_shard_bytes=max_shard_bytes)
    monkeypatch.delattr("os.fsync")
    assert not write(tmp_path / "thrown away", ENTRIES, max_shard_bytes, kept=False).records
    files = sorted(path.name for path in (tmp_path / "thrown away").iterdir())
    assert files == sorted(written.records)
    for name in files:
        one, other = (tmp_path / place / name for place in ("kept", "thrown away"))
        assert one.read_bytes() == other.read_bytes()


def test_single_file_is_what_the_library_reads(tmp_path):
    write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    check_with_library(tmp_path, ["model.safetensors"])


@pytest.mark.parametrize("limit", [1, 60, 100, 130])
def test_shards_and_index(tmp_path, limit):
    records = write(tmp_path, max_shard_bytes=limit).records
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert records.keys() == {*files, "model.safetensors.index.json"}
    assert index["metadata"]["total_size"] == sum(entry.nbytes for entry in ENTRIES)
    check_with_library(tmp_path, files)
    for file in files:
        names = load_file(tmp_path / file).keys()
        assert {name for name, where in index["weight_map"].items() if where == file} == names
        sizes = [entry.nbytes for entry in ENTRIES if entry.name in names]
        assert sum(sizes) <= limit or len(sizes) == 1
    for entry in ENTRIES:
        np.testing.assert_array_equal(
            as_array(stored_tensors(tmp_path)[entry.name]), random_bits(entry)
        )


def test_every_tensor_is_aligned_to_its_element(tmp_path):
    write(tmp_path)
    for tensor in stored_tensors(tmp_path).values():
        assert tensor.offset % ELEMENT_BYTES[tensor.dtype] == 0
    assert min(tensor.offset for tensor in stored_tensors(tmp_path).values()) % 8 == 0


def test_records_are_true(tmp_path):
    for file, record in write(tmp_path, max_shard_bytes=60).records.items():
        content = (tmp_path / file).read_bytes()
        assert record.size == len(content)
        assert record.sha256 == hashlib.sha256(content).hexdigest()


def test_blocks_of_any_size_make_the_same_file(tmp_path):
    entry = TensorEntry("a", "BF16", (3000, 1000))
    bits = random_bits(entry)
    hashes = set()
    for number, cuts in enumerate([[], [1], [0, 5, 5, 2999], list(range(1, 3000))]):
        directory = tmp_path / str(number)
        directory.mkdir()
        with ShardWriter(directory, plan_shards([entry])) as writer:
            writer.write("a", np.split(bits, cuts))
        hashes.add(writer.records["model.safetensors"].sha256)
    assert len(hashes) == 1


def test_many_short_tensors_are_written_together(tmp_path, monkeypatch):
    lengths = []

    class Counting(FileIO):
        def write(self, data):
            lengths.append(len(data))
            return super().write(data)

    monkeypatch.setattr(writer_module, "FileIO", Counting)
    entries = [TensorEntry(f"layer.{i}", "BF16", (3, 7)) for i in range(20_000)]
    entries.insert(10_000, TensorEntry("long", "BF16", (400, 400)))
    with ShardWriter(tmp_path, plan_shards(entries)) as writer:
        for number, entry in enumerate(writer.order):
            writer.write(entry.name, [np.full(entry.shape, number, np.uint16)])
    assert len(lengths) < 10
    found = load_file(tmp_path / "model.safetensors")
    assert len(found) == 20_001
    for number in (0, 9_999, 10_000, 10_001, 20_000):
        raw = found[entries[number].name].view(torch.int16).numpy().view(np.uint16)
        np.testing.assert_array_equal(raw, np.full(entries[number].shape, number))
    content = (tmp_path / "model.safetensors").read_bytes()
    record = writer.records["model.safetensors"]
    assert (record.size, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_data_is_sent_to_the_disk_on_the_way(tmp_path, monkeypatch):
    """Every byte is asked for once, in order, before the flush; where the system has no such call,
    nothing else changes."""
    ranges, advise = [], writer_module.os.posix_fadvise

    def noting(descriptor, begin, length, advice):
        ranges.append((begin, begin + length))
        advise(descriptor, begin, length, advice)

    monkeypatch.setattr(writer_module.os, "posix_fadvise", noting)
    monkeypatch.setattr(writer_module, "_SEND_BYTES", 300_000)
    entries = [TensorEntry(f"t{i}", "BF16", (400, 400)) for i in range(7)]
    (tmp_path / "one").mkdir()
    with_advice = write(tmp_path / "one", entries).records
    assert len(ranges) == 7
    assert ranges[0][0] == 0
    assert all(one[1] == other[0] for one, other in pairwise(ranges))
    monkeypatch.delattr(writer_module.os, "posix_fadvise")
    (tmp_path / "two").mkdir()
    assert write(tmp_path / "two", entries).records == with_advice


def test_an_exception_leaves_no_index_and_no_thread(tmp_path):
    before = threading.active_count()
    shards = plan_shards(ENTRIES, 60)
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, shards) as writer:  # noqa: PT012
        for entry in writer.order[:-1]:
            writer.write(entry.name, [random_bits(entry)])
        raise KeyboardInterrupt
    assert not (tmp_path / "model.safetensors.index.json").exists()
    assert threading.active_count() == before


@pytest.mark.parametrize("when", ["write", "fsync"])
def test_full_disk(tmp_path, monkeypatch, when):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    if when == "fsync":
        monkeypatch.setattr(writer_module.os, "fsync", fail)
    else:
        broken = type("Broken", (FileIO,), {"write": fail})
        monkeypatch.setattr(writer_module, "FileIO", broken)
    with pytest.raises(OutputError, match=r"model.*safetensors: cannot be written \(No space"):
        write(tmp_path, max_shard_bytes=60)


def test_short_writes_are_continued(tmp_path, monkeypatch):
    class Slow(FileIO):
        def write(self, data):
            return super().write(data[:7])

    monkeypatch.setattr(writer_module, "FileIO", Slow)
    write(tmp_path)
    check_with_library(tmp_path, ["model.safetensors"])


def test_an_existing_file_is_not_overwritten(tmp_path):
    (tmp_path / "model.safetensors").write_text("precious")
    with pytest.raises(OutputError, match="File exists"):
        write(tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "precious"


def test_wrong_order_and_wrong_size_are_our_bugs(tmp_path):
    shards = plan_shards(ENTRIES)
    with pytest.raises(AssertionError), ShardWriter(tmp_path, shards) as writer:
        writer.write(writer.order[1].name, [])
    (tmp_path / "x").mkdir()
    with pytest.raises(AssertionError), ShardWriter(tmp_path / "x", shards) as writer:
        writer.write(writer.order[0].name, [random_bits(ENTRIES[0])])
    (tmp_path / "y").mkdir()
    with pytest.raises(AssertionError), ShardWriter(tmp_path / "y", shards):
        pass


def test_shard_size_must_be_positive():
    with pytest.raises(UsageError):
        plan_shards(ENTRIES, 0)

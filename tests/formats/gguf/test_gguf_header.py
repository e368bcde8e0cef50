"""Files that nobody should trust: one line of refusal, and no memory for what they claim."""

from __future__ import annotations

import contextlib
import random
import struct
from pathlib import Path

import gguf
import pytest
from gguf_cases import make

from spp_export.common.errors import CheckpointError
from spp_export.formats.gguf import GgufOptions
from spp_export.formats.gguf.contents import gguf_contents
from spp_export.formats.gguf.header import read_gguf
from spp_export.formats.gguf.write import write_gguf
from spp_export.models.checkpoint.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    dense = make("llama-mha-tied", tmp_path_factory.mktemp("header"))
    decoder = open_checkpoint(dense)
    contents = gguf_contents(decoder, GgufOptions(quant="q8_0"), "tiny")
    write_gguf(decoder, contents, dense)
    return (dense / "model.gguf").read_bytes()


def refused(tmp_path: Path, data: bytes, match: str = "damaged or hostile") -> None:
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=match) as caught:
        read_gguf(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_read_is_what_the_gguf_package_reads(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(good)
    ours, theirs = read_gguf(tmp_path), gguf.GGUFReader(path)
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    found = {k: list(v.items) if v.is_array else v.items for k, v in ours.metadata.items()}
    assert found == fields
    places = {t.name: (t.data_offset, t.n_bytes) for t in theirs.tensors}
    assert {name: (p.offset, p.nbytes) for name, p in ours.tensors.items()} == places


@pytest.mark.parametrize("keep", [0, 3, 4, 12, 24, 60, 4000, -33, -1])
def test_a_file_cut_short(good: bytes, keep: int, tmp_path: Path) -> None:
    refused(tmp_path, good[:keep])


@pytest.mark.parametrize(
    ("offset", "form", "value"),
    [
        (0, "4s", b"GGML"),
        (4, "<I", 2),
        (8, "<Q", 1 << 62),
        (8, "<Q", 5000),
        (16, "<Q", 1 << 62),
        (24, "<Q", 1 << 62),
    ],
)
def test_counts_that_the_file_cannot_have(
    good: bytes, offset: int, form: str, value: object, tmp_path: Path
) -> None:
    data = bytearray(good)
    struct.pack_into(form, data, offset, value)
    refused(tmp_path, bytes(data))


def test_an_array_of_a_billion_bytes(good: bytes, tmp_path: Path) -> None:
    key = b"tokenizer.ggml.tokens"
    place = good.index(key) + len(key) + 8
    data = bytearray(good)
    struct.pack_into("<Q", data, place, 1 << 30)
    refused(tmp_path, bytes(data), "claims an array of 1073741824 values")


def tensor_place(good: bytes, name: bytes) -> int:
    """Where the number of dimensions of a tensor stands."""
    return good.rindex(struct.pack("<Q", len(name)) + name) + 8 + len(name)


@pytest.mark.parametrize(
    ("at", "form", "value", "match"),
    [
        (0, "<I", 9, "of 9 dimensions"),
        (4, "<Q", 1 << 40, "does not lie where"),
        (4, "<Q", 0, "has shape"),
        (4, "<Q", 33, "has shape"),
        (20, "<I", 12, "of type 12, which spp never writes"),
        (24, "<Q", 1 << 60, "does not lie where"),
        (24, "<Q", 0, "does not lie where"),
    ],
)
def test_tensors_that_lie(
    good: bytes, at: int, form: str, value: int, match: str, tmp_path: Path
) -> None:
    data = bytearray(good)
    struct.pack_into(form, data, tensor_place(good, b"blk.1.attn_q.weight") + at, value)
    refused(tmp_path, bytes(data), match)


def test_more_than_the_tensors(good: bytes, tmp_path: Path) -> None:
    refused(tmp_path, good + bytes(32), "its tensors end at")


def test_any_one_byte_of_the_header_may_be_wrong(good: bytes, tmp_path: Path) -> None:
    rng, end = random.Random(0), good.rindex(b"output_norm.weight") + 60
    for _ in range(300):
        data = bytearray(good)
        data[rng.randrange(end)] = rng.randrange(256)
        (tmp_path / "model.gguf").write_bytes(bytes(data))
        with contextlib.suppress(CheckpointError):
            read_gguf(tmp_path)


def test_a_link_out_of_the_directory(good: bytes, tmp_path: Path) -> None:
    inside = tmp_path / "out"
    inside.mkdir()
    (tmp_path / "secret").write_bytes(good)
    (inside / "model.gguf").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="leads out of the model's directory"):
        read_gguf(inside)

"""Artifacts made to be trouble: values that overflow, files that unfold or are no files."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_artifacts import make

from spp_cli.main import run
from spp_export.common.errors import ArtifactsError
from spp_export.data.artifacts import read_artifacts, write_artifacts
from spp_export.data.published_artifacts import import_published

FILES = (
    "artifacts.json",
    "calibration.jsonl",
    "importance.safetensors",
    "probes.safetensors",
    "whitelist.json",
)


@pytest.fixture
def directory(tmp_path):
    target = tmp_path / "artifacts"
    target.mkdir()
    write_artifacts(make(), target)
    return target


def refuses(directory, capsys, match):
    """One line; by the command too, with exit 2."""
    with pytest.raises(ArtifactsError) as caught:
        read_artifacts(directory)
    message = str(caught.value)
    assert match in message
    assert "\n" not in message
    assert len(message) < 1000 + 2 * len(str(directory))
    assert run(["show", str(directory)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def change_tensors(directory, file, change):
    tensors = load_file(directory / file)
    change(tensors)
    save_file(tensors, directory / file)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "nothing"])
def test_what_is_no_file(directory, capsys, file, kind):
    path = directory / file
    path.unlink()
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
    if file == "artifacts.json":  # by which the command knows what it is
        with pytest.raises(ArtifactsError):
            read_artifacts(directory)
        return
    refuses(directory, capsys, file)


@pytest.mark.parametrize("file", FILES)
def test_sizes(directory, capsys, file):
    """Sparse files of a terabyte are not read."""
    os.truncate(directory / file, 1 << 40)
    tracemalloc.start()
    try:
        refuses(directory, capsys, "is larger than")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("file", ["importance.safetensors", "probes.safetensors"])
@pytest.mark.parametrize("claimed", [2 << 20, 100_000_000, 1 << 63])
def test_headers(directory, capsys, file, claimed):
    (directory / file).write_bytes(struct.pack("<Q", claimed) + b'{"a":' + bytes(100))
    refuses(directory, capsys, f"its header claims {claimed} bytes")


# File, tensor, value: finite in float32 or not, all would make scores that are not.
VALUES = {
    "weight without end": ("probes.safetensors", "weight", 3e38),
    "bias without end": ("probes.safetensors", "bias", -3e38),
    "temperature of nothing": ("probes.safetensors", "temperature", 1e-45),
    "temperature below": ("probes.safetensors", "temperature", -1.0),
    "axis without end": ("probes.safetensors", "axes", 1e16),
    "importance without end": ("importance.safetensors", "head/energy", 3e38),
    "not a number": ("importance.safetensors", "channel/energy", float("nan")),
    "infinite": ("importance.safetensors", "head/axis", float("-inf")),
}


@pytest.mark.parametrize("kind", VALUES)
def test_values(directory, capsys, kind):
    file, name, value = VALUES[kind]

    def change(tensors):
        tensors[name].reshape(-1)[-1] = value

    change_tensors(directory, file, change)
    refuses(directory, capsys, name.rpartition("/")[0])


SHAPES = {
    "no domains": ("probes.safetensors", "weight", (3, 0, 8)),
    "no layers": ("probes.safetensors", "weight", (0, 2, 8)),
    "flat": ("probes.safetensors", "weight", (48,)),
    "another layer": ("probes.safetensors", "temperature", (2, 4)),
    "no heads": ("importance.safetensors", "head/energy", (2, 3, 0)),
    "other heads": ("importance.safetensors", "head/energy", (2, 3, 5)),
    "other domains": ("importance.safetensors", "channel/energy", (3, 3, 6)),
}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64", "bool"])
def test_shapes_and_types(directory, capsys, kind, dtype):
    file, name, shape = SHAPES[kind]
    change_tensors(directory, file, lambda tensors: tensors.update({name: np.ones(shape, dtype)}))
    refuses(directory, capsys, "expected")


def header(**changes):
    def change(content):
        content.update(changes)

    return change


HEADERS = {
    "domains without end": header(domains=[f"d{n}" for n in range(100_000)]),
    "a domain without end": header(domains=["x" * 10**6, "math"]),
    "a domain of two lines": header(domains=["a\nb", "math"]),
    "a domain twice": header(domains=["math", "math"]),
    "domains that are numbers": header(domains=[1, 2]),
    "regimes that are lists": header(regimes=[["in-domain"], ["x"]]),
    "a fingerprint of two lines": header(model={"fingerprint": "a\nb"}),
    "a fingerprint that is a number": header(model={"fingerprint": 7}),
    "sizes that are words": header(model={"fingerprint": "f", "num_layers": "x" * 10**6}),
    "a key without end": header(**{"k" * 10**6: 1}),
    "probe layers beyond": header(manifest={"probe_layers": [0, 10**4000]}),
    "probe layers in words": header(manifest={"probe_layers": ["0"]}),
    "true probe layers": header(manifest={"probe_layers": [True]}),
    "no probe layers": header(manifest={"probe_layers": []}),
    "a share above one": header(manifest={"shrinkage": {"chosen": 2}}),
    "a true share": header(manifest={"shrinkage": {"chosen": True}}),
    "a share without end": header(manifest={"shrinkage": {"chosen": 10**4000}}),
    "a share of lists": header(manifest={"regime_choice": [0.5]}),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_edited_headers(directory, capsys, kind):
    path = directory / "artifacts.json"
    content = json.loads(path.read_text())
    HEADERS[kind](content)
    path.write_text(json.dumps(content))
    refuses(directory, capsys, "artifacts")


TEXTS = {
    "deep": ("artifacts.json", b'{"a":' * 10**6, "nested deeper"),
    "deep list": ("whitelist.json", b"[" * 10**6, "nested deeper"),
    "pairs without end": ("whitelist.json", b"[" + b"[0,0]," * 1_200_000 + b"[0,0]]", "more than"),
    "pairs of one": ("whitelist.json", b"[[0]]", "expected a list of [layer, head]"),
    "pairs of numbers in words": ("whitelist.json", b'[["0", 1]]', "expected a list of"),
    "true pairs": ("whitelist.json", b"[[true, 1]]", "expected a list of"),
    "half pairs": ("whitelist.json", b"[[0.0, 1]]", "expected a list of"),
    "a head below": ("whitelist.json", b"[[0, -1]]", "does not exist"),
    "a head beyond": ("whitelist.json", b"[[0, 1" + b"0" * 4000 + b"]]", "does not exist"),
    "the same twice": ("whitelist.json", b"[[0, 1], [0, 1]]", "twice"),
    "infinite": ("whitelist.json", b"[[0, Infinity]]", "not a finite number"),
    "no object": ("calibration.jsonl", b"[]", "line 1"),
    "no text": ("calibration.jsonl", b'\n{"domain": "math"}', "line 2"),
    "text that is a number": ("calibration.jsonl", b'{"domain": "math", "text": 1}', "line 1"),
    "another domain": ("calibration.jsonl", b'{"domain": "x", "text": "y"}', "is of the domain"),
    "deep line": ("calibration.jsonl", b'{"domain":' * 10**5, "line 1"),
    "not UTF-8": ("calibration.jsonl", b'{"domain": "\xff"}', "not UTF-8"),
    "half a pair": ("calibration.jsonl", b'{"domain": "math", "text": "\\ud800"}', "half of"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_texts(directory, capsys, kind):
    file, content, match = TEXTS[kind]
    (directory / file).write_bytes(content)
    refuses(directory, capsys, match)


def test_empty_lines_without_end_take_no_memory(directory):
    """A list of them would be eight times the file."""
    (directory / "calibration.jsonl").write_bytes(b"\n" * (1 << 20))
    tracemalloc.start()
    try:
        assert read_artifacts(directory).calibration == ()
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_published_pipes_are_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "head_importance.pt")
    with pytest.raises(ArtifactsError, match="got a pipe"):
        import_published(tmp_path)
    assert run(["artifacts", "import", str(tmp_path), "-o", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()

"""One byte changed anywhere in an output is noticed, whatever its format.

`make test` tries bytes all over every file, `make test-all` every one of the small files.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from exporting import refused
from onnx_exports import exported_onnx

import spp_export
from spp_cli.main import run
from spp_export import OnnxOptions
from spp_export.common.errors import ModelError, SppError
from spp_export.common.manifest import check_manifest

pytestmark = pytest.mark.thinned(most=6)

NAME = "llama-mha-tied"
FORMATS = ("safetensors", "onnx")
SMALL, SAMPLE = 4000, 64  # bytes of a file that is tried at every offset, and offsets of others
FEW = 16
SLOW = pytest.mark.slow


@pytest.fixture(scope="module", params=FORMATS)
def written(request, workshop, tmp_path_factory) -> Path:
    """An export in each format, which tests change and put right again."""
    out = workshop.exported(NAME)
    if request.param == "onnx":
        out = exported_onnx(workshop, NAME, options=OnnxOptions(quant="int4"))
    return shutil.copytree(out.path, tmp_path_factory.mktemp("flipped") / "out")


@contextmanager
def flipped(path: Path, offset: int, mask: int) -> Iterator[None]:
    """A file with other bits in one byte, for a while."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        before = os.pread(descriptor, 1, offset)
        os.pwrite(descriptor, bytes([before[0] ^ mask]), offset)
        yield
        os.pwrite(descriptor, before, offset)
    finally:
        os.close(descriptor)


def flips(directory: Path, sample: int) -> Iterator[tuple[Path, int, int]]:
    """Files with offsets, every one of a small file where `sample` is large, and bits to change."""
    rng = random.Random(6)
    for path in sorted(directory.iterdir()):
        size = path.stat().st_size
        every = size <= SMALL and sample >= SAMPLE
        for offset in range(size) if every else sorted(rng.sample(range(size), sample)):
            yield path, offset, rng.randrange(1, 256)


@pytest.mark.parametrize(
    ("sample", "least"), [(FEW, 100), pytest.param(SAMPLE, 5000, marks=SLOW)], ids=["some", "every"]
)
def test_every_flipped_byte_is_a_problem_of_its_file(written, sample, least):
    assert check_manifest(written) == []
    tried = 0
    for path, offset, mask in flips(written, sample):
        with flipped(path, offset, mask):
            problems = check_manifest(written)
        assert problems, f"{path.name}: byte {offset} ^ {mask:#x} went unnoticed"
        assert path.name in " ".join(problems) or path.name == "manifest.json"
        tried += 1
    assert tried > least
    assert check_manifest(written) == []


@pytest.mark.parametrize("step", [17, pytest.param(3, marks=SLOW)])
def test_every_bit_of_the_manifest_counts(written, step):
    path = written / "manifest.json"
    for offset in range(0, path.stat().st_size, step):
        for bit in range(8):
            with flipped(path, offset, 1 << bit):
                assert check_manifest(written), f"bit {bit} of byte {offset} went unnoticed"


def test_the_command_says_no_in_one_line(written, capsys):
    """Before it opens the dense model, which need not be there."""
    for path, offset, mask in flips(written, 3):
        with flipped(path, offset, mask):
            status = run(["verify", str(written), "--model", str(written / "none")])
        said = capsys.readouterr().err
        assert status == 1
        assert said.startswith("error: files as the manifest lists them: ")
        assert said.count("\n") == 1


def test_show_names_the_file_and_needs_no_dense_model(written, capsys):
    for path, offset, mask in flips(written, 2):
        with flipped(path, offset, mask):
            assert run(["show", str(written)]) == 0
            found = spp_export.show(written)
        assert found.problems
        assert any(path.name in line for line in found.problems) or path.name == "manifest.json"
        assert found.kind == (
            "ONNX export" if (written / "model.onnx").exists() else "slim checkpoint"
        )
        assert "every file is as the manifest lists it" not in capsys.readouterr().out


DAMAGES = {
    "gone": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "link": lambda path: (path.rename(path.parent.parent / "real"), path.symlink_to("../real")),
    "directory": lambda path: (path.unlink(), path.mkdir()),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "extra": lambda path: (path.parent / f"{path.name}.old").write_bytes(b""),
    "folder": lambda path: (path.parent / "folder").mkdir(),
}


def weights(directory: Path) -> str:
    """The file that the weights are in."""
    return next(
        name for name in ("model.onnx_data", "model.safetensors") if (directory / name).exists()
    )


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_are_gone_or_something_else(written, tmp_path, damage, capsys):
    for name in ("manifest.json", "plan.json", "README.md", weights(written)):
        copy = shutil.copytree(written, tmp_path / name / "out")
        DAMAGES[damage](copy / name)
        status = run(["verify", str(copy), "--model", str(tmp_path / "none")])
        said = capsys.readouterr().err
        assert (status, said.count("\n")) == (1, 1), (name, said)
        assert run(["show", str(copy)]) == 0
        assert capsys.readouterr().err == ""
        assert spp_export.show(copy).problems


def test_a_mode_or_a_time_is_no_content(written):
    for path in written.iterdir():
        path.chmod(0o600)
        os.utime(path, (0, 0))
    assert check_manifest(written) == []


@pytest.mark.parametrize("file", ["manifest.json", "plan.json", "model.safetensors", "README.md"])
@pytest.mark.parametrize("damage", ["gone", "cut", "link"])
def test_convert_refuses_what_was_changed(workshop, tmp_path, file, damage):
    slim = shutil.copytree(workshop.exported(NAME).path, tmp_path / "a" / "slim")
    DAMAGES[damage](slim / file)
    with refused(ModelError, "Write the export again"):
        spp_export.convert(slim, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "directory"])
def test_what_runs_a_damaged_export_answers_or_refuses_in_one_line(
    written, tmp_path, damage, capsys
):
    """Hashes are for `verify`: chat reads what it needs, and says what is wrong with that."""
    for name in sorted(path.name for path in written.iterdir()):
        copy = shutil.copytree(written, tmp_path / name / "out")
        DAMAGES[damage](copy / name)
        status = run(["chat", str(copy), "--prompt", "ab", "--raw", "--max-new-tokens", "1", "-q"])
        said = capsys.readouterr().err
        assert (status, said.count("\n")) in ((0, 0), (2, 1)), (name, said)
        assert "internal error" not in said
        if status and name.endswith((".safetensors", ".onnx")):
            assert name in said or str(copy) in said


def test_load_slim_refuses_damaged_weights_by_name(workshop, tmp_path):
    slim = shutil.copytree(workshop.exported(NAME).path, tmp_path / "slim")
    weights = slim / "model.safetensors"
    whole = weights.read_bytes()
    for data in (b"", whole[:100], whole[:-1], b"\xff" * 8 + whole[8:]):
        weights.write_bytes(data)
        with refused(SppError, "slim"):
            spp_export.load_slim(slim)

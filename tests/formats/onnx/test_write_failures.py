"""What goes wrong while a graph is written, as an error of ours."""

from __future__ import annotations

import errno

import onnx_ir
import pytest
from factories import CASES

from spp_export.common.errors import CheckpointError, OutputError
from spp_export.formats.onnx import OnnxOptions
from spp_export.formats.onnx.write import write_onnx


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (CheckpointError("it has changed."), CheckpointError),
        (OSError(errno.ENOSPC, "No space left"), OSError),
        (ValueError("nobody's"), onnx_ir.serde.SerdeError),
    ],
)
def test_an_error_while_small_tensors_are_read_is_the_readers(
    cause, expected, tmp_path, monkeypatch
):
    def save(*_):
        try:
            raise cause
        except Exception as error:
            raise onnx_ir.serde.SerdeError("Error calling serialize") from error

    dense = CASES[0].make(tmp_path)
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(onnx_ir, "save", save)
    with pytest.raises(expected) as caught:
        write_onnx(dense, tmp_path / "out", OnnxOptions())
    assert caught.value is cause or expected is onnx_ir.serde.SerdeError


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def save(*_):
        raise OSError(errno.ENOSPC, "No space left")

    dense = CASES[0].make(tmp_path)
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(onnx_ir, "save", save)
    with pytest.raises(OutputError, match="No space left"):
        write_onnx(dense, tmp_path / "out", OnnxOptions())

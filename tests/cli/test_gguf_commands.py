"""The options of GGUF files: what `export` and `convert` ask for, and what they say of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_results import REPORT, export_result
from typer.testing import CliRunner

import spp_export
from spp_cli.main import app
from spp_export import ConvertResult, ExportRequest, GgufOptions
from spp_export.commands.requests import ConvertRequest
from spp_export.common.errors import UsageError
from spp_export.formats.gguf.engines import gguf_engines
from spp_export.formats.gguf.options import PRECISIONS, QUANTS

FORM = {
    "architecture": "deci",
    "precision": None,
    "quant": "q4_0",
    "tensors": {"f16": 2, "f32": 61, "q4_0": 208, "q8_0": 1},
    "not_quantised": ["blk.0.attn_output.weight", "blk.1.attn_output.weight"],
}
REPORTED = {**REPORT, "gguf": FORM, "quantisation": {**REPORT["quality"], "mean_kl": 0.0312}}


def converted():
    engines = gguf_engines("deci")
    options, path = GgufOptions(quant="q4_0"), Path("out/chemistry-gguf")
    return ConvertResult(path, "per-layer", options, engines, 91_234_567, REPORTED, FORM)


@pytest.fixture
def library(monkeypatch):
    """Keywords of calls by function name."""
    calls = {}
    answers = {"export": export_result(), "convert": converted()}

    def recorder(name):
        def call(**keywords):
            calls[name] = keywords
            return answers[name]

        return call

    for name in answers:
        monkeypatch.setattr(spp_export, name, recorder(name), raising=False)
    return calls


def invoke(*arguments):
    result = CliRunner().invoke(app, arguments)
    if isinstance(result.exception, UsageError):
        raise result.exception
    return result


@pytest.mark.parametrize(
    ("flags", "form"),
    [
        ([], GgufOptions()),
        (["--quant", "q4_0"], GgufOptions(quant="q4_0")),
        (["--precision", "fp16"], GgufOptions("fp16")),
        *[(["--quant", quant], GgufOptions(quant=quant)) for quant in QUANTS],
        *[(["--precision", precision], GgufOptions(precision)) for precision in PRECISIONS],
    ],
)
def test_the_form_reaches_the_library(library, flags, form):
    invoke("export", "--scenario", "s", "--format", "gguf", *flags)
    assert ExportRequest(**library["export"]).form == form
    assert invoke("convert", "x", "-o", "y", "--format", "gguf", *flags).exit_code == 0
    assert ConvertRequest(**library["convert"]).form == form


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--format", "gguf", "--quant", "int8"], "--quant int8: --format gguf has q8_0, q4_0"),
        (["--format", "onnx", "--quant", "q8_0"], "--quant q8_0: --format onnx has int8, int4"),
        (["--format", "gguf", "--onnx-attention", "gqa"], "--onnx-attention: is for ONNX"),
        (["--quant", "q8_0"], "--quant: is for ONNX and GGUF. Add --format onnx or gguf"),
    ],
)
def test_options_of_another_format_are_refused(library, arguments, complaint):
    with pytest.raises(UsageError, match=complaint):
        invoke("export", "--scenario", "s", *arguments)
    assert not library


def test_the_summary_says_how_tensors_are_stored(library):
    result = invoke("convert", "x", "-o", "y", "--format", "gguf", "--quant", "q4_0")
    assert result.exit_code == 0
    flat = " ".join(result.stdout.split())
    assert "GGUF file: architecture deci" in flat
    assert "tensors: 2 f16, 61 f32, 208 q4_0, 1 q8_0" in flat
    assert "no multiple of 32: 2 tensors" in flat
    assert "quantising: KL 0.031" in flat
    assert "LM Studio" in flat

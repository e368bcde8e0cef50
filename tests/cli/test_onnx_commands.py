"""The options of ONNX graphs: what `export` and `convert` ask for, and what they say of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_results import REPORT, export_result
from typer.testing import CliRunner

import spp_export
from spp_cli.main import app
from spp_export import ConvertResult, ExportRequest, OnnxOptions
from spp_export.commands.requests import ConvertRequest
from spp_export.common.errors import ParityError, UsageError
from spp_export.formats.onnx.engines import onnx_engines
from spp_export.formats.onnx.options import ATTENTIONS, PRECISIONS, QUANTS

COST = {
    **REPORT["quality"],
    "mean_kl": 0.0312,
    "top1": 0.943,
    "intervals": {},
    "source": "default conversations",
}
FORM = OnnxOptions("gqa-bias", "fp16", "int4")


def converted(**changes):
    fields = {
        "path": Path("out/chemistry-onnx"),
        "layout": "per-layer",
        "options": FORM,
        "engines": onnx_engines("llama", "per-layer", **FORM.to_dict()),
        "nbytes": 91_234_567,
        "report": {**REPORT, "quantisation": COST},
    }
    return ConvertResult(**(fields | changes))


def exported(form=FORM, **changes):
    return export_result(
        format="onnx",
        form=form.to_dict(),
        nbytes=91_234_567,
        engines=onnx_engines("llama", "per-layer", **form.to_dict()),
        **changes,
    )


@pytest.fixture
def library(monkeypatch):
    """Arguments of calls by function name; answers can be replaced."""
    answers = {"export": exported(), "convert": converted()}
    calls = {"answers": answers}

    def recorder(name):
        def call(**keywords):
            calls[name] = keywords
            if isinstance(answers[name], Exception):
                raise answers[name]
            return answers[name]

        return call

    for name in answers:
        monkeypatch.setitem(vars(spp_export), name, recorder(name))
    return calls


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize(
    ("flags", "form"),
    [
        ([], OnnxOptions()),
        (["--device", "cuda"], OnnxOptions(precision="fp16")),
        (["--device", "cuda:1", "--precision", "bf16"], OnnxOptions(precision="bf16")),
        (["--onnx-attention", "standard"], OnnxOptions("standard")),
        (["--precision", "fp16", "--quant", "int8"], OnnxOptions(precision="fp16", quant="int8")),
        (
            ["--onnx-attention", "gqa-bias", "--precision", "fp32", "--quant", "int8-dynamic"],
            OnnxOptions("gqa-bias", "fp32", "int8-dynamic"),
        ),
    ],
    ids=str,
)
def test_the_form_of_a_graph(library, flags, form):
    """Said in the same words to both commands."""
    assert invoke("export", "--scenario", "s", "--format", "onnx", *flags).exit_code == 0
    assert ExportRequest(**library["export"]).form == form
    assert invoke("convert", "out/chemistry", "-o", "x", *flags).exit_code == 0
    assert ConvertRequest(**library["convert"]).form == form


def test_safetensors_have_no_form(library):
    invoke("export", "--scenario", "s")
    assert library["export"] == {"scenario": "s"}


@pytest.mark.parametrize("format", [[], ["--format", "safetensors"]])
@pytest.mark.parametrize(
    ("flag", "value"),
    [("--onnx-attention", "gqa"), ("--precision", "fp32"), ("--quant", "int8")],
)
def test_options_of_a_graph_without_one_are_refused(library, format, flag, value):  # noqa: A002
    with pytest.raises(UsageError, match=f"^{flag}: is for ONNX.*Add --format onnx.*, or drop"):
        invoke("export", "--scenario", "s", *format, flag, value)
    assert "export" not in library


@pytest.mark.parametrize(
    ("flag", "known"),
    [("--onnx-attention", ATTENTIONS), ("--precision", PRECISIONS), ("--quant", QUANTS)],
)
@pytest.mark.parametrize(
    "command", [["export", "--scenario", "s", "--format", "onnx"], ["convert"]]
)
def test_the_choices_are_the_librarys(library, command, flag, known):
    tail = ["x", "-o", "y"] if command == ["convert"] else []
    for value in known:
        assert invoke(*command, *tail, flag, value).exit_code == 0
    refused = invoke(*command, *tail, flag, "other")
    assert refused.exit_code == 2
    for value in known:
        assert f"'{value}'" in refused.stderr


def test_convert_passes_every_flag(library):
    result = invoke(
        *("convert", "out/chemistry", "-o", "out/x", "--format", "onnx", "--scenario", "s.txt"),
        *("--device", "cuda:1", "--seed", "3", "--force", "--no-verify", "--keep-failed"),
    )
    assert result.exit_code == 0
    assert library["convert"] == {
        "checkpoint": "out/chemistry",
        "output": Path("out/x"),
        "scenario": "s.txt",
        "force": True,
        "verify": False,
        "keep_failed": True,
        "device": "cuda:1",
        "seed": 3,
    }
    assert ConvertRequest(**library["convert"]).form == OnnxOptions(precision="fp16")


def test_convert_defaults(library):
    invoke("convert", "demo", "-o", "out/x")
    assert library["convert"] == {"checkpoint": "demo", "output": Path("out/x")}
    request = ConvertRequest(**library["convert"])
    assert (request.force, request.verify, request.keep_failed) == (False, True, False)
    assert (request.scenario, request.device, request.seed) == (None, "cpu", 0)


@pytest.mark.parametrize(
    "arguments", [["convert"], ["convert", "x"], ["convert", "x", "-o", "y", "--format", "tflite"]]
)
def test_what_convert_cannot_do_without(library, arguments):
    assert invoke(*arguments).exit_code == 2
    assert "convert" not in library


def test_a_failed_check_ends_convert(library):
    library["answers"]["convert"] = ParityError("prefill: found 3, at most 1.")
    with pytest.raises(ParityError):
        invoke("convert", "x", "-o", "y")


def test_json_of_a_conversion(library):
    result = invoke("convert", "x", "-o", "y", "--json")
    found = json.loads(result.stdout)
    assert found == json.loads(json.dumps(converted().to_dict()))
    assert set(found) == {"path", "format", "layout", "onnx", "bytes", "engines", "verify"}
    assert found["onnx"] == {"attention": "gqa-bias", "precision": "fp16", "quant": "int4"}
    assert set(found["engines"][0]) == set(onnx_engines("llama", "uniform")[0].to_dict())
    assert result.stderr == ""


def test_json_of_an_export(library):
    found = json.loads(invoke("export", "--scenario", "s", "--format", "onnx", "--json").stdout)
    assert found["format"] == "onnx"
    assert found["onnx"] == {**FORM.to_dict(), "bytes": 91_234_567}
    library["answers"]["export"] = export_result()
    found = json.loads(invoke("export", "--scenario", "s", "--json").stdout)
    assert (found["format"], found["onnx"]) == ("safetensors", None)


def test_quiet_prints_the_path(library):
    assert invoke("convert", "x", "-o", "y", "--quiet").stdout == "out/chemistry-onnx\n"


def test_a_conversion_in_words(library):
    result = invoke("convert", "x", "-o", "y")
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert lines[0] == "out/chemistry-onnx   per-layer layout"
    assert "ONNX graph: gqa-bias, fp16, int4, 91.2 MB" in lines
    first = lines.index("quantising: KL 0.031, same token 94.3%")
    assert lines[first + 1 : first + 4] == [
        "  perplexity 1.030 times, 18.20 before, 18.75 after",
        "  1,234 tokens: default conversations",
        "  uncertain: measured on fewer than 2,000 tokens",
    ]
    assert any(line.startswith("ok") and "prefix causality" in line for line in lines)
    assert any(line.startswith("transformers.js") for line in lines)
    assert result.stderr == "next: spp chat out/chemistry-onnx --prompt ...\n"


def test_an_unchecked_conversion_in_words(library):
    library["answers"]["convert"] = converted(report=None, options=OnnxOptions())
    text = invoke("convert", "x", "-o", "y", "--no-verify").stdout
    assert "not checked: --no-verify" in text
    assert "ONNX graph: gqa, fp32, not quantised, 91.2 MB" in text
    assert "quantising" not in text


def test_an_export_in_words(library):
    library["answers"]["export"] = exported(report={**REPORT, "quantisation": COST})
    text = invoke("export", "--scenario", "s", "--format", "onnx").stdout
    assert "ONNX graph: gqa-bias, fp16, int4, 91.2 MB" in text
    assert "quantising: KL 0.031" in text
    assert "quality: KL 0.043" in text
    assert len(text.splitlines()) <= 50
    library["answers"]["export"] = export_result()
    assert "ONNX" not in invoke("export", "--scenario", "s").stdout.split("\n\n")[0]


@pytest.mark.parametrize("command", ["export", "convert"])
def test_help_explains_the_options(command):
    text = " ".join(invoke(command, "--help").stdout.split())
    for flag in ("--onnx-attention", "--precision", "--quant"):
        assert flag in text
    assert f"Example: spp {command} " in text

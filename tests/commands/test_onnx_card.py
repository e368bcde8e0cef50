"""The card of an ONNX directory, and the engines it lists."""

from __future__ import annotations

import contextlib
import io

import pytest
from factories import CASES, random_layers, shape_of, write_slim

from spp_export.formats.card import onnx_card
from spp_export.formats.onnx.engines import onnx_engines

CHECKS = {"checks": [{"name": "prefill", "passed": True, "detail": "max |d| 1e-5"}]}
ATTENTIONS = ("gqa", "gqa-bias", "standard")


def test_a_converted_model_is_not_called_pruned():
    card = onnx_card("out", "org/model", "gqa", CHECKS, onnx_engines("llama", "uniform"), "mit")
    assert card.startswith("---\nbase_model: org/model\nlibrary_name: onnx\nlicense: mit\n")
    assert "tags:\n- onnx\n- spp\n---\n" in card
    assert "# out\n\nThe model org/model as an ONNX graph" in card
    assert "- prefill: passed. max |d| 1e-5".replace("|", "\\|") in card
    assert card.count("| yes |") == 4


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_side_of_the_padding_is_told(attention):
    card = onnx_card("out", "org/model", attention, None, (), None)
    assert ("Padding: on the right only." in card) == (attention == "gqa")
    assert ("Padding: on either side" in card) == (attention != "gqa")


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
def test_engines_of_a_graph(layout, attention):
    engines = {engine.name: engine for engine in onnx_engines("llama", layout, attention)}
    assert {engine.loads for engine in engines.values()} == {"yes"}
    single = {name for name in engines if "one text at a time" in engines[name].how}
    expected = {"onnxruntime", "transformers.js", "optimum"} if attention == "gqa" else set()
    assert single == expected
    assert ("spp_export.ort" in engines["optimum"].how) == (layout == "per-layer")


@pytest.mark.parametrize("options", [{"precision": "fp16"}, {"quant": "int4"}])
def test_not_every_engine_is_tested_with_every_form(options):
    loads = {engine.name: engine.loads for engine in onnx_engines("llama", "per-layer", **options)}
    assert loads["onnxruntime"] == loads["onnxruntime-genai"] == "yes"
    assert loads["transformers.js"] == loads["optimum"] == "expected"


@pytest.mark.parametrize(("family", "loads"), [("gpt_oss", "yes"), ("glm4", "no")])
def test_an_engine_without_a_class_of_the_family_is_not_explained(family, loads):
    engines = onnx_engines(family, "per-layer", "gqa-bias")
    assert {engine.name: engine.loads for engine in engines}["transformers.js"] == loads
    card = onnx_card("out", "org/model", "gqa-bias", None, engines, None)
    assert ("With transformers.js:" in card) == (loads == "yes")
    assert "```\n\n| engine |" in card


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_sinks_beside_windows_need_a_newer_runtime(attention):
    hows = {engine.name: engine.how for engine in onnx_engines("gpt_oss", "uniform", attention)}
    assert ("1.24 or newer" in hows["onnxruntime"]) == (attention == "gqa")


def test_bf16_is_for_cuda():
    engines = {engine.name: engine for engine in onnx_engines("llama", "uniform", precision="bf16")}
    assert engines.pop("transformers.js").loads == "no"
    assert {engine.loads for engine in engines.values()} == {"expected"}
    assert all("on CUDA" in engine.how for engine in engines.values())


def test_a_name_stays_within_its_markup():
    card = onnx_card('a"]<b>\n# x', "org/m\n- injected", "gqa", None, (), None)
    assert [line for line in card.splitlines() if line.startswith("# ")] == ['# a"\\]\\<b\\> \\# x']
    assert "\n- injected" not in card
    assert '"text-generation", "a\\"]<b>\\n# x", options' in card


def test_the_python_of_the_card_runs(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime_genai")
    from spp_export.formats.onnx import OnnxOptions
    from spp_export.formats.onnx.write import write_onnx

    dense = CASES[0].make(tmp_path)
    slim = write_slim(tmp_path / "slim", dense, random_layers(shape_of(dense), 0))
    out = tmp_path / "out"
    out.mkdir()
    write_onnx(slim, out, OnnxOptions())
    card = onnx_card("out", "tiny", "gqa", None, (), None)
    monkeypatch.chdir(out)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(card.split("```python\n")[1].split("```")[0], {})
    assert said.getvalue().startswith("The experiment shows")

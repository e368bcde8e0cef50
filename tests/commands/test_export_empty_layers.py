"""Exports whose layers keep no attention or no MLP, in every format, and who decides about them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf_cases
import pytest
from exporting import Workshop, read_config, refused, write_plan
from factories import CASES, format_options, random_layers, shape_of
from family_models import emptied
from gguf_cases import add_merges
from greedy import clear_prompt, random_prompts
from pairs import few

import spp_export
from spp_cli.main import run
from spp_export import GgufOptions, OnnxOptions
from spp_export.common.errors import BudgetError, PlanError
from spp_export.models.engines import engines_for
from spp_export.models.loader import load_slim
from spp_export.planning import read_plan

CASE = {case.name: case for case in CASES}
NAME = "llama-gqa-bias"
# Of three layers, those without attention and those without an MLP.
PLACES = {"first": ((0,), (2,)), "middle": ((1, 2), (0, 1)), "last": ((2,), (1,))}
FORMS = {
    "safetensors": None,
    "gqa": OnnxOptions(),
    "standard": OnnxOptions(attention="standard"),
    "int4": OnnxOptions(quant="int4"),
    "gguf": GgufOptions(),
    "q8_0": GgufOptions(quant="q8_0"),
}
NAMES = ("llama-mha-tied", NAME, "mistral-window-tied", "qwen2-gqa-tied", "qwen3-gqa-tied")
ROWS = [
    (name, form, places)
    for name in NAMES
    for form in FORMS
    for places in PLACES
    if name in gguf_cases.FAMILIES or form not in ("gguf", "q8_0")
]


def planned(tmp_path: Path, name: str, places: str, **changes: object) -> tuple[Path, Path]:
    """A dense checkpoint, and a plan in a file."""
    dense = add_merges(CASE[name].make(tmp_path))
    layers = emptied(random_layers(shape_of(dense), 5), *PLACES[places])
    return dense, write_plan(tmp_path / "asked.json", dense, layers, **changes)


@pytest.mark.thinned(most=8)
@pytest.mark.parametrize(("name", "form", "places"), few(ROWS, lambda row: set(row[:2]) | {row}))
def test_every_format_gives_the_masked_models_logits(tmp_path, name, form, places):
    """What is checked on every export: in llama.cpp and ONNX Runtime too, with a cache."""
    dense, plan = planned(tmp_path, name, places)
    options = {} if FORMS[form] is None else format_options(FORMS[form])
    result = spp_export.export(output=tmp_path / "out", model=str(dense), plan=plan, **options)
    assert result.report["passed"]
    names = [check["name"] for check in result.report["checks"]]
    assert any("oracle" in name or "masked" in name or "its own weights" in name for name in names)
    assert read_plan(tmp_path / "out" / "plan.json").layers == read_plan(plan).layers
    assert spp_export.verify(tmp_path / "out", model=str(dense)).passed


def test_the_graph_has_no_cache_for_a_layer_without_attention(tmp_path):
    import onnx

    dense, plan = planned(tmp_path, NAME, "first")
    options = format_options(OnnxOptions())
    result = spp_export.export(output=tmp_path / "out", model=str(dense), plan=plan, **options)
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    numbers = {value.name.split(".")[1] for value in graph.input if "past" in value.name}
    assert numbers == {"1", "2"}
    assert {value.name.split(".")[1] for value in graph.output if "pres" in value.name} == numbers
    shape = shape_of(dense)
    heads = sum(layer.kv_heads for layer in read_plan(plan).layer_shapes(shape))
    assert result.predicted.kv_bytes == heads * 2 * shape.head_dim * 4


def test_genai_says_what_the_slim_model_says(tmp_path):
    og = pytest.importorskip("onnxruntime_genai")
    dense, plan = planned(tmp_path, NAME, "first")
    for target, options in (("slim", {}), ("onnx", format_options(OnnxOptions()))):
        spp_export.export(output=tmp_path / target, model=str(dense), plan=plan, **options)
    prompt, expected = clear_prompt(load_slim(tmp_path / "slim"), random_prompts(9, 1), 12)
    model = og.Model(str(tmp_path / "onnx"))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + 12)
    generator = og.Generator(model, params)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    assert list(generator.get_sequence(0))[len(prompt) :] == expected


@pytest.mark.parametrize("compensate", ["lstsq", "bias"])
def test_what_goes_as_a_whole_is_compensated(workshop: Workshop, tmp_path, compensate):
    """By a bias the mean write of all heads stays; a re-fit has nothing left to fit."""
    layers = emptied(random_layers(shape_of(workshop.dense(NAME)), 5), *PLACES["middle"])
    plan = write_plan(tmp_path / "p.json", workshop.dense(NAME), layers, compensation=compensate)
    result = workshop.export(NAME, tmp_path / "out", plan=plan, keep=None)
    assert result.report["passed"]
    options = format_options(OnnxOptions())
    made = workshop.export(NAME, tmp_path / "onnx", plan=plan, keep=None, **options)
    assert made.report["passed"]


def test_report_card_and_show_say_which(workshop: Workshop, tmp_path, capsys):
    layers = emptied(random_layers(shape_of(workshop.dense(NAME)), 5), *PLACES["middle"])
    plan = write_plan(tmp_path / "p.json", workshop.dense(NAME), layers)
    workshop.export(NAME, tmp_path / "out", plan=plan, keep=None)
    words = ("ayers 1, 2 keep no attention, and nothing in the KV cache", "ayers 0, 1 keep no MLP")
    spp_export.report(tmp_path / "out", tmp_path / "page.html")
    for page in (tmp_path / "page.html", tmp_path / "out" / "README.md"):
        assert all(word in page.read_text() for word in words)
    assert run(["show", str(tmp_path / "out" / "plan.json"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["facts"]
    assert (facts["kv_heads"][1:], facts["channels"][:2]) == ([0, 0], [0, 0])
    config = read_config(tmp_path / "out")
    shapes = [layer.shape(shape_of(workshop.dense(NAME))) for layer in layers]
    assert config["num_attention_heads_per_layer"] == [shape.query_heads for shape in shapes]
    (vllm,) = [
        engine for engine in engines_for("llama", "per-layer", shapes) if engine.name == "vLLM"
    ]
    assert (vllm.loads, "--no-allow-empty-layers" in vllm.how) == ("no", True)


@pytest.mark.parametrize("criterion", ["obs", "fisher", "energy"])
def test_below_a_group_per_layer_some_layers_lose_their_attention(workshop: Workshop, criterion):
    """Where every layer keeps a group there is no such plan."""
    asked = {"keep": 0.12, "criterion": criterion, "compensate": "lstsq"}
    result = workshop.plan(NAME, **asked, allow_empty_layers=True)
    kept = [len(layer.kv_heads) for layer in result.plan.layers]
    assert 0 in kept
    assert any(kept)
    assert result.plan.policy["empty_layers"] is True
    with refused(BudgetError, "is below the smallest plan, .*one KV group per layer"):
        workshop.plan(NAME, **asked, allow_empty_layers=False)


def test_a_layer_may_lose_its_mlp(workshop: Workshop, tmp_path):
    """Where widths are few, one that loses most is nothing."""
    asked = {"units": "channels", "keep": 0.3, "width_multiple": 64}
    result = workshop.plan(NAME, **asked, allow_empty_layers=True)
    assert () in [layer.channels for layer in result.plan.layers]
    made = workshop.export(NAME, tmp_path / "out", **asked, allow_empty_layers=True)
    assert made.plan.layers == result.plan.layers
    assert made.report["passed"]


def test_the_command_line_decides(workshop: Workshop, capsys):
    common = ["plan", "--model", str(workshop.dense(NAME)), "--scenario", str(workshop.scenario)]
    common += ["--artifacts", str(workshop.artifacts(NAME)), "--answer-tokens", "0", "--json"]

    def decided(*options: str) -> tuple[int, str]:
        """Exit status, and the layers or the error."""
        code = run([*common, "--keep", "0.12", *options])
        said = capsys.readouterr()
        if code:
            return code, said.err
        return code, str([layer["kv_heads"] for layer in json.loads(said.out)["plan"]["layers"]])

    code, layers = decided("--allow-empty-layers")
    assert (code, "[]" in layers) == (0, True)
    assert decided() == (0, layers)
    for options, message in (
        (["--no-allow-empty-layers"], "is below the smallest plan"),
        (["--allow-empty-layers", "--layout", "uniform"], "a stock config cannot say"),
        (["--allow-empty-layers", "--tp", "2"], "--tp is for vLLM"),
    ):
        code, error = decided(*options)
        assert code in (1, 2)
        assert message in error


def test_a_plan_without_attention_is_refused(tmp_path):
    dense = CASE[NAME].make(tmp_path)
    layers = [
        replace(layer, kv_heads=(), query_heads=()) for layer in random_layers(shape_of(dense), 5)
    ]
    plan = write_plan(tmp_path / "p.json", dense, layers)
    with refused(PlanError, "plan keeps attention in no layer"):
        spp_export.export(output=tmp_path / "out", model=str(dense), plan=plan)
    assert not (tmp_path / "out").exists()

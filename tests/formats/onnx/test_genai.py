"""Directories of ours in onnxruntime-genai: every family, every form of attention."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from factories import (
    CASES,
    Case,
    random_layers,
    shape_of,
    uniform_layers,
    write_slim,
)
from family_models import slim_experts
from greedy import clear_prompt, random_prompts
from old_transformers import since_5
from pairs import few, of_family
from transformers import AutoTokenizer

from spp_export import load_slim
from spp_export.formats.onnx import OnnxOptions
from spp_export.formats.onnx.runtime.generation import generate
from spp_export.formats.onnx.runtime.model import OrtModel
from spp_export.formats.onnx.write import write_onnx
from spp_export.models.hub import locate_model

pytestmark = pytest.mark.thinned(most=4)

og = pytest.importorskip("onnxruntime_genai")

ATTENTIONS = ("gqa", "gqa-bias", "standard")
NEW_TOKENS = 12


def generated(directory: Path, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """What genai adds to a batch of prompts of one length, greedily as by default."""
    model = og.Model(str(directory))
    params = og.GeneratorParams(model)
    length = len(prompts[0])
    params.set_search_options(max_length=length + new_tokens, batch_size=len(prompts))
    generator = og.Generator(model, params)
    generator.append_tokens([token for prompt in prompts for token in prompt])
    while not generator.is_done():
        generator.generate_next_token()
    return [list(generator.get_sequence(i))[length:] for i in range(len(prompts))]


def written(tmp_path: Path, slim: Path, **options: str) -> Path:
    out = tmp_path / "onnx"
    out.mkdir()
    write_onnx(slim, out, OnnxOptions(**options))
    return out


def slim_of(case: Case, tmp_path: Path) -> Path:
    dense = case.make(tmp_path)
    return write_slim(tmp_path / "slim", dense, random_layers(shape_of(dense), 5))


@pytest.mark.parametrize(
    ("case", "attention"), few(itertools.product(CASES, ATTENTIONS), of_family), ids=str
)
def test_every_family_says_what_the_slim_model_says(case, tmp_path, attention):
    """Prompts longer than the sliding windows, in a batch of two."""
    slim = slim_of(case, tmp_path)
    model = load_slim(slim)
    pairs = [clear_prompt(model, random_prompts(9, seed), NEW_TOKENS) for seed in (1, 2)]
    out = written(tmp_path, slim, attention=attention)
    found = generated(out, [prompt for prompt, _ in pairs], NEW_TOKENS)
    assert found == [expected for _, expected in pairs]


@since_5("dropping experts needs transformers 5")
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", ["mixtral", "glm4_moe", "gpt_oss"])
def test_experts_and_sinks(tmp_path, family, attention):
    """Layers that differ in heads, in experts and in the width of these."""
    slim = slim_experts(family, tmp_path)
    model = load_slim(slim)
    pairs = [clear_prompt(model, random_prompts(9, seed), NEW_TOKENS) for seed in (1, 2)]
    out = written(tmp_path, slim, attention=attention)
    found = generated(out, [prompt for prompt, _ in pairs], NEW_TOKENS)
    assert found == [expected for _, expected in pairs]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_uniform_layers(tmp_path, attention):
    dense = Case("q", "qwen2", {"kv_heads": 4, "query_heads": 8}).make(tmp_path)
    layers = uniform_layers(shape_of(dense), 0, kv_heads=2, group_size=1, channels=40)
    slim = write_slim(tmp_path / "slim", dense, layers, "uniform")
    prompt, expected = clear_prompt(load_slim(slim), random_prompts(9), NEW_TOKENS)
    out = written(tmp_path, slim, attention=attention)
    assert generated(out, [prompt], NEW_TOKENS) == [expected]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_half_precision(tmp_path, attention):
    """Against float32, on a prompt whose every step is won by more than float16 loses."""
    slim = slim_of(CASES[0], tmp_path)
    prompt, expected = clear_prompt(load_slim(slim), random_prompts(9), NEW_TOKENS, margin=0.1)
    out = written(tmp_path, slim, attention=attention, precision="fp16")
    assert generated(out, [prompt], NEW_TOKENS) == [expected]


@pytest.mark.parametrize("quant", ["int8", "int4", "int8-dynamic"])
def test_quantised_weights(tmp_path, quant):
    """Against our own runtime on the same graph, as the weights are others than PyTorch's."""
    slim = slim_of(CASES[0], tmp_path)
    prompt, _ = clear_prompt(load_slim(slim), random_prompts(9), NEW_TOKENS)
    out = written(tmp_path, slim, quant=quant)
    steps = generate(OrtModel.load(out), [prompt], max_new_tokens=NEW_TOKENS)
    assert generated(out, [prompt], NEW_TOKENS) == [[step[0] for step in steps]]


@pytest.mark.parametrize(
    "where", ["generation_config.json", "config.json", "tokenizer_config.json", "template"]
)
def test_generation_stops_at_eos(tmp_path, where):
    """A token of the model's answer, made one that ends it where a checkpoint may say so."""
    slim = slim_of(CASES[0], tmp_path)
    prompt, expected = clear_prompt(load_slim(slim), random_prompts(9), NEW_TOKENS)
    length = next(i for i in range(3, NEW_TOKENS) if expected[i] not in expected[:i])
    (slim / "generation_config.json").write_text("{}")
    token = AutoTokenizer.from_pretrained(slim).convert_ids_to_tokens(expected[length])
    if where == "template":
        added = json.loads((slim / "tokenizer.json").read_text())
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        entry = {"id": expected[length], "content": token, **flags, "special": True}
        added["added_tokens"] = sorted([*added["added_tokens"], entry], key=lambda t: t["id"])
        (slim / "tokenizer.json").write_text(json.dumps(added))
        template = "{% for m in messages %}{{ m.content }}" + token + "{% endfor %}"
        (slim / "chat_template.jinja").write_text(template)
    else:
        settings = json.loads((slim / where).read_text())
        named = {"eos_token": token} if where[0] == "t" else {"eos_token_id": [2, expected[length]]}
        (slim / where).write_text(json.dumps(settings | named))
    found = generated(written(tmp_path, slim), [prompt], NEW_TOKENS)
    assert found == [expected[:length]]


def test_the_tokenizer_is_read(tmp_path):
    out = written(tmp_path, slim_of(CASES[0], tmp_path))
    text = "Sulfuric acid, H2SO4"
    tokenizer = og.Tokenizer(og.Model(str(out)))
    ids = list(tokenizer.encode(text))
    assert ids == AutoTokenizer.from_pretrained(out)(text).input_ids
    assert tokenizer.decode(ids) == text


@pytest.mark.demo
@pytest.mark.slow
def test_the_default_model(tmp_path):
    source = locate_model("demo").path
    layers = random_layers(shape_of(source), 0, channels=False)
    slim = write_slim(tmp_path / "slim", source, layers)
    texts = ("Sulfuric acid is", "The treaty of 1648 ended a war that")
    prompts = AutoTokenizer.from_pretrained(source)(list(texts)).input_ids
    prompt, expected = clear_prompt(load_slim(slim), prompts, 8)
    assert generated(written(tmp_path, slim), [prompt], 8) == [expected]

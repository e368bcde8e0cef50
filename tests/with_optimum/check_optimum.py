"""ONNX directories in optimum-onnx's decoder, against the slim model in PyTorch.

    python -m pytest tests/with_optimum/check_optimum.py

Not a name that pytest collects: `make test-optimum` runs it in an environment with optimum-onnx,
whose transformers is older than the project's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from factories import (
    CASES,
    Case,
    make_checkpoint,
    random_layers,
    shape_of,
    uniform_layers,
    write_slim,
)
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

from spp_export.common.errors import DownloadError, UsageError
from spp_export.formats.onnx.options import ATTENTIONS, OnnxOptions
from spp_export.formats.onnx.runtime import ORTSlimForCausalLM
from spp_export.formats.onnx.write import write_onnx
from spp_export.models.hub import demo_model
from spp_export.models.loader import load_slim
from spp_export.planning import LayerPlan

# The first two have one length.
PROMPTS = ("Sulfuric acid is", "Nitric acids are", "The treaty of 1648 ended a war that")
NEW_TOKENS = 8
FAMILIES = sorted({case.family for case in CASES})
PADDED = [attention for attention in ATTENTIONS if attention != "gqa"]

binding = pytest.mark.parametrize("bound", [False, True], ids=["arrays", "io-binding"])


class Directories:
    """A slim checkpoint and its ONNX directories, each written once."""

    def __init__(self, slim: Path) -> None:
        self.slim = slim
        self.model = load_slim(slim, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(slim, padding_side="left")

    def onnx(self, attention: Any, precision: Any = "fp32") -> Path:
        target = self.slim.with_name(f"{self.slim.name}-{attention}-{precision}")
        if not target.exists():
            target.mkdir()
            write_onnx(self.slim, target, OnnxOptions(attention, precision))
        return target

    def batch(self, *prompts: str) -> dict[str, torch.Tensor]:
        return dict(self.tokenizer(list(prompts), padding=True, return_tensors="pt"))


def per_layer(case: Case, where: Path) -> Directories:
    dense = case.make(where)
    return Directories(write_slim(where / "slim", dense, random_layers(shape_of(dense), 5)))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def directories(request, tmp_path_factory):
    return per_layer(request.param, tmp_path_factory.mktemp("per-layer"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return per_layer(CASES[1], tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=FAMILIES)
def uniform(request, tmp_path_factory):
    where = tmp_path_factory.mktemp("uniform")
    dense = make_checkpoint(where, request.param, kv_heads=4, query_heads=8)
    layers = uniform_layers(shape_of(dense), 5, kv_heads=2, group_size=2, channels=40)
    return Directories(write_slim(where / "slim", dense, layers, "uniform"))


def generated(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> list[list[int]]:
    """New tokens of every row, the same number each."""
    torch.manual_seed(7)
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    found = model.generate(**inputs, **settings | options)
    return found[:, inputs["input_ids"].shape[1] :].tolist()


def assert_same(found: Any, expected: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Equal logits at real tokens, and equal greedy, sampled and beam-searched continuations."""
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        wanted = expected(**inputs).logits[real]
        assert (found(**inputs).logits[real] - wanted).abs().max() < 1e-4 * wanted.abs().max()
    for options in (
        {},
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"use_cache": False},
    ):
        assert generated(found, inputs, **options) == generated(expected, inputs, **options)


@binding
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_layers_with_other_kv_heads_each(directories, attention, bound):
    found = ORTSlimForCausalLM.from_pretrained(directories.onnx(attention), use_io_binding=bound)
    assert_same(found, directories.model, directories.batch(PROMPTS[2]))
    assert_same(found, directories.model, directories.batch(*PROMPTS[:2]))
    if attention in PADDED:
        assert_same(found, directories.model, directories.batch(*PROMPTS))


@binding
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_uniform_layers_in_the_stock_class(uniform, attention, bound):
    for kind in (ORTModelForCausalLM, ORTSlimForCausalLM):
        found = kind.from_pretrained(uniform.onnx(attention), use_io_binding=bound)
        assert_same(found, uniform.model, uniform.batch(*PROMPTS[:2]))
        if attention in PADDED:
            assert_same(found, uniform.model, uniform.batch(*PROMPTS))


def test_the_stock_class_cannot_run_what_the_subclass_is_for(llama):
    found = ORTModelForCausalLM.from_pretrained(llama.onnx("standard"))
    with pytest.raises(Exception, match="invalid dimensions for input: past_key_values"):
        found.generate(**llama.batch(PROMPTS[0]))


@binding
def test_half_precision(llama, bound):
    inputs = llama.batch(*PROMPTS)
    real = inputs["attention_mask"].bool()
    directory = llama.onnx("gqa-bias", "fp16")
    found = ORTSlimForCausalLM.from_pretrained(directory, use_io_binding=bound)
    with torch.no_grad():
        logits = found(**inputs).logits
        wanted = llama.model(**inputs).logits[real]
    assert logits.dtype == torch.float16
    error = (logits[real].float() - wanted).norm() / wanted.norm()
    assert error < 32 * torch.finfo(torch.float16).eps
    assert len(generated(found, inputs)[0]) == NEW_TOKENS


@pytest.mark.parametrize("side", ["left", "right"])
def test_gqa_refuses_to_generate_from_padded_rows(llama, side):
    found = ORTSlimForCausalLM.from_pretrained(llama.onnx("gqa"))
    llama.tokenizer.padding_side = side
    inputs = llama.batch(*PROMPTS)
    llama.tokenizer.padding_side = "left"
    with pytest.raises(UsageError, match="--onnx-attention gqa-bias"):
        found.generate(**inputs, max_new_tokens=1)


def test_gqa_computes_logits_of_rows_padded_on_the_right_alone(llama):
    found = ORTSlimForCausalLM.from_pretrained(llama.onnx("gqa"))
    with pytest.raises(UsageError, match="--onnx-attention gqa-bias"):
        found(**llama.batch(*PROMPTS))
    llama.tokenizer.padding_side = "right"
    inputs = llama.batch(*PROMPTS)
    llama.tokenizer.padding_side = "left"
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        wanted = llama.model(**inputs).logits[real]
    assert (found(**inputs).logits[real] - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_no_mask_is_a_mask_of_ones(llama, attention):
    found = ORTSlimForCausalLM.from_pretrained(llama.onnx(attention))
    inputs = llama.batch(PROMPTS[0])
    assert torch.equal(found(inputs["input_ids"]).logits, found(**inputs).logits)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_tokenizer_beside_the_graph(llama, attention):
    tokenizer = AutoTokenizer.from_pretrained(llama.onnx(attention))
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert torch.equal(inputs["input_ids"], llama.batch(PROMPTS[0])["input_ids"])


def test_saving_and_loading_again_changes_nothing(llama, tmp_path):
    found = ORTSlimForCausalLM.from_pretrained(llama.onnx("gqa-bias"))
    found.save_pretrained(tmp_path)
    again = ORTSlimForCausalLM.from_pretrained(tmp_path)
    inputs = llama.batch(*PROMPTS)
    assert torch.equal(again(**inputs).logits, found(**inputs).logits)


@pytest.mark.demo
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_default_model(slim_demo, attention):
    for bound in (False, True):
        directory = slim_demo.onnx(attention)
        found = ORTSlimForCausalLM.from_pretrained(directory, use_io_binding=bound)
        prompts = PROMPTS if attention in PADDED else PROMPTS[2:]
        inputs = slim_demo.batch(*prompts)
        inputs.pop("token_type_ids", None)  # of a cache that an older version of us filled
        assert generated(found, inputs) == generated(slim_demo.model, inputs)


@pytest.fixture(scope="module")
def slim_demo(tmp_path_factory):
    """The default model with one KV head and its group gone in every other layer."""
    try:
        dense = demo_model()
    except DownloadError as error:
        pytest.skip(f"this transformers reads the default model from the cache only: {error}")
    whole = LayerPlan((0, 1, 2), tuple(range(9)), None)
    part = LayerPlan((0, 2), (0, 1, 2, 6, 7, 8), None)
    target = tmp_path_factory.mktemp("demo") / "slim"
    return Directories(write_slim(target, dense, [whole, part] * 15))

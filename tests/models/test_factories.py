"""The tiny checkpoints are what the tests that use them take them for."""

from __future__ import annotations

import json

import pytest
import torch
from factories import CASES, VOCAB, make_checkpoint, random_layers, shape_of
from transformers import AutoTokenizer

from spp_export.models.loader import load_dense

TEXT = "Sulfuric acid, H₂SO₄: naïve  café\n\t“quoted” 12.5 °C — 酸 🧪"


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def dense(request, tmp_path_factory):
    path = request.param.make(tmp_path_factory.mktemp(request.param.name))
    return request.param, path


def test_cases_cover_what_they_say():
    assert {case.family for case in CASES} == {"llama", "mistral", "qwen2", "qwen3"}
    assert any(case.options.get("tied") for case in CASES)
    assert any(case.options.get("shards", 1) > 2 for case in CASES)
    groups = {(case.options["kv_heads"], case.options["query_heads"]) for case in CASES}
    assert any(kv == query for kv, query in groups)
    assert any(kv == 1 < query for kv, query in groups)
    assert any(1 < kv < query for kv, query in groups)


def test_files_are_as_asked(dense):
    case, path = dense
    shards = sorted(file.name for file in path.glob("*.safetensors"))
    assert len(shards) >= case.options.get("shards", 1)
    assert (path / "model.safetensors.index.json").exists() == (len(shards) > 1)
    assert json.loads((path / "config.json").read_text())["model_type"] == case.family


def test_logits_are_not_degenerate(dense):
    model = load_dense(dense[1], torch.float64)
    ids = torch.randint(3, 259, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids).logits[0]
    assert 0.3 < logits.std().item() < 10
    assert len(set(logits.argmax(-1).tolist())) > 5
    for name, value in model.named_parameters():
        assert value.std() > 0.05, name


def test_vocabulary_is_no_width_of_a_layer(dense):
    shape = shape_of(dense[1])
    widths = {shape.hidden_size, shape.channels, shape.head_dim}
    widths |= {heads * shape.head_dim for heads in (shape.query_heads, shape.kv_heads)}
    assert shape.vocab_size == VOCAB
    assert VOCAB not in widths


def test_tokenizer_encodes_any_text(dense):
    tokenizer = AutoTokenizer.from_pretrained(dense[1])
    ids = tokenizer(TEXT)["input_ids"]
    assert max(ids) < len(tokenizer) <= VOCAB
    assert tokenizer.decode(ids) == TEXT
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_equal_arguments_give_equal_bytes(tmp_path):
    first, second = (
        make_checkpoint(tmp_path, "qwen2", kv_heads=2, query_heads=4, name=name, seed=3)
        for name in ("a", "b")
    )
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name
    other = make_checkpoint(tmp_path, "qwen2", kv_heads=2, query_heads=4, name="c", seed=4)
    weights = "model.safetensors"
    assert (first / weights).read_bytes() != (other / weights).read_bytes()


def test_random_plans_are_regular(dense):
    shape = shape_of(dense[1])
    for layer in (layer for seed in range(20) for layer in random_layers(shape, seed)):
        assert layer.shape(shape).regular
        groups = [head // shape.group_size for head in layer.query_heads]
        assert sorted(set(groups)) == list(layer.kv_heads)
        assert len({groups.count(group) for group in layer.kv_heads}) == 1

"""Which tokens end an answer, wherever a model says it, and that `generate` is told."""

from __future__ import annotations

import json

import pytest
from factories import make_checkpoint
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer

from spp_export.models.families import FAMILIES
from spp_export.models.stop_tokens import generation_config, stop_tokens, turn_end

LLAMA = {"model_type": "llama"}
CHATML = "{% for m in messages %}<t>{{ m.role }}\n{{ m.content }}<|endoftext|>\n{% endfor %}"
# <pad> is 0, <s> 1, </s> 2, <|endoftext|> 259; what is between are bytes.
END, OTHER, BYTE = 2, 259, 77


@pytest.fixture
def dense(tmp_path):
    return make_checkpoint(tmp_path, "llama", kv_heads=2, query_heads=4)


@pytest.fixture
def tokenizer(dense):
    return AutoTokenizer.from_pretrained(dense)


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name in CONFIG_MAPPING])
def test_a_familys_default_is_that_of_transformers_class(model_type):
    stock = AutoConfig.for_model(model_type).eos_token_id
    assert FAMILIES[model_type].end_token == (tuple(stock) if isinstance(stock, list) else stock)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({}, {}, ()),
        ({}, LLAMA, (END,)),
        ({}, {"model_type": "spp_llama"}, (END,)),
        ({}, LLAMA | {"eos_token_id": None}, ()),
        ({}, LLAMA | {"eos_token_id": [7, 5]}, (7, 5)),
        ({"eos_token_id": 7}, LLAMA, (7,)),
        ({"eos_token_id": 7}, LLAMA | {"eos_token_id": 9}, (7, 9)),
        ({"eos_token_id": [7, 9, 7]}, {"eos_token_id": 9}, (7, 9)),
        ({"eos_token_id": [True, "8", 3.0]}, {}, ()),
    ],
)
def test_files_alone(generation, config, expected):
    assert stop_tokens(generation, config, None) == expected


def test_the_tokenizers_end_is_added(tokenizer):
    assert stop_tokens({"eos_token_id": BYTE}, {}, tokenizer) == (BYTE, END)
    assert stop_tokens({"eos_token_id": OTHER}, {"eos_token_id": END}, tokenizer) == (OTHER, END)


def test_no_stale_number_ends_an_answer_at_a_word(tokenizer):
    """Only what `generate` would stop at may be no special token."""
    assert stop_tokens({"eos_token_id": OTHER}, {"eos_token_id": BYTE}, tokenizer) == (OTHER, END)
    assert stop_tokens({}, {"eos_token_id": BYTE}, tokenizer) == (BYTE, END)


def test_the_template_says_what_ends_a_turn(tokenizer):
    assert turn_end(tokenizer) is None
    tokenizer.chat_template = CHATML
    assert turn_end(tokenizer) == OTHER
    assert stop_tokens({"eos_token_id": END}, {}, tokenizer) == (END, OTHER)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{{ 1 / 0 }}",
        "{% for m in messages %}{{ m.content }}\n{% endfor %}",
        "{% for m in messages %}{{ m.role }}<|endoftext|>{% endfor %}",
        "{% nonsense",
    ],
)
def test_a_template_that_ends_no_turn(tokenizer, template):
    tokenizer.chat_template = template
    assert turn_end(tokenizer) is None


def test_generate_is_told_what_it_would_miss(dense, tokenizer):
    config = json.loads((dense / "config.json").read_text())
    assert generation_config(dense, config, tokenizer, config) is None
    stored = {"eos_token_id": BYTE, "temperature": 0.5}
    (dense / "generation_config.json").write_text(json.dumps(stored))
    written = generation_config(dense, config, tokenizer, config)
    assert written == {"eos_token_id": [BYTE, END], "temperature": 0.5}


def test_a_model_without_the_file_gets_one_where_its_config_says_less(dense, tokenizer):
    (dense / "generation_config.json").unlink()
    config = {"model_type": "qwen2", "pad_token_id": 0, "eos_token_id": OTHER}
    written = generation_config(dense, config, tokenizer, config)
    assert written == {"eos_token_id": [OTHER, END], "pad_token_id": 0}
    config["eos_token_id"] = END
    assert generation_config(dense, config, tokenizer, config) is None
    assert generation_config(dense, config, tokenizer, {"model_type": "qwen2"}) is not None

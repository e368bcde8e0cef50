"""Conversations as a model's chat template writes them, also one that knows few roles."""

from __future__ import annotations

import pytest
from factories import make_checkpoint
from tokenizers import processors
from transformers import AutoTokenizer

from spp_export.calibration.reading import chat_text, token_texts
from spp_export.common.errors import ScenarioError
from spp_export.data.conversation import Conversation, Message

ANY_ROLE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if date_string is defined and add_generation_prompt %}never{% endif %}"
)
IN_TURN = (
    "{% for m in messages %}"
    "{% if m['role'] != ('user' if loop.index0 is even else 'assistant') %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "[{{ m['role'][0] }}]{{ m['content'] }}{% endfor %}"
)
DAY = "{{ date_string }}: {{ messages[0]['content'] }}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("chat")
    return make_checkpoint(root, "llama", kv_heads=1, query_heads=2, layers=1)


def tokenizer_of(checkpoint, template):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.bos_token = "a"
    tokenizer.chat_template = template
    return tokenizer


def chat(*said):
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return Conversation(tuple(Message(roles[role], text) for role, text in said), chat=True)


FULL = chat(("s", "S."), ("u", "One?"), ("a", "{}"), ("t", "1"), ("u", "And?"), ("a", "Two."))


def test_the_template_writes_every_role_and_all_special_tokens(checkpoint):
    tokenizer = tokenizer_of(checkpoint, ANY_ROLE)
    text = chat_text(tokenizer, FULL)
    assert text == (
        "a<system>S.\n<user>One?\n<assistant>{}\n<tool>1\n<user>And?\n<assistant>Two.\n"
    )
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="a $A", special_tokens=[("a", tokenizer.convert_tokens_to_ids("a"))]
    )
    read, plain = token_texts(tokenizer, [FULL, "b"])
    assert tokenizer.decode(read.runs[0]) == text
    assert tokenizer.decode(plain.runs[0]) == "ab"


def test_a_template_that_knows_two_sides_gets_two_sides(checkpoint):
    text = chat_text(tokenizer_of(checkpoint, IN_TURN), FULL)
    assert text == "[u]S.\n\nOne?[a]{}[u]1\n\nAnd?[a]Two."


def test_what_does_not_fit_the_template_is_refused_by_its_beginning(checkpoint):
    began = chat(("a", "Hello,\n I am first"), ("u", "So?"))
    with pytest.raises(ScenarioError, match=r"begins 'Hello, I am first'.*roles must alternate"):
        chat_text(tokenizer_of(checkpoint, IN_TURN), began)


def test_without_a_template_messages_follow_one_another(checkpoint):
    assert (
        chat_text(tokenizer_of(checkpoint, None), FULL) == "S.\n\nOne?\n\n{}\n\n1\n\nAnd?\n\nTwo."
    )


def test_a_template_with_a_date_gives_the_same_text_every_day(checkpoint):
    assert chat_text(tokenizer_of(checkpoint, DAY), chat(("u", "x"))) == "01 Jan 2026: x"

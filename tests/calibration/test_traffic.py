"""Traffic: prompts in the model's chat template with the dense model's own answers."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from factories import make_checkpoint
from transformers import AutoModelForCausalLM

from spp_export.calibration.activations import token_batches
from spp_export.calibration.answers import Answering, read_traffic, scenario_traffic
from spp_export.calibration.reading import TokenText, token_texts
from spp_export.common.options import WINDOW
from spp_export.common.progress import show_progress
from spp_export.data.conversation import Conversation, Message, plain
from spp_export.models.session import open_session

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
QUESTIONS = [plain("What is it?"), plain("Why?"), plain("And this one, which is longer, is what?")]
LIMIT = 64 * WINDOW


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("answers")
    place = make_checkpoint(root, "llama", kv_heads=1, query_heads=2, layers=2)
    path = place / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    return place


@pytest.fixture
def session(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("SPP_CACHE", str(tmp_path / "cache"))
    return open_session(str(checkpoint))


class Halves(NamedTuple):
    """In place of a scenario."""

    calibration: tuple[Conversation, ...]
    held_out: tuple[Conversation, ...]

    def split(self):
        return self


def said(text):
    ((ids,), (answers,)) = text.runs, text.answers
    return [id_ for id_, answer in zip(ids, answers, strict=True) if answer]


def test_prompts_are_asked_in_the_template_and_answered(session):
    read = read_traffic(session, QUESTIONS, LIMIT, Answering(tokens=7))
    tokenizer = session.tokenizer
    for question, text in zip(QUESTIONS, read.texts, strict=True):
        answer = said(text)
        assert 1 <= len(answer) <= 7
        asked = text.runs[0][: -len(answer)]
        assert tokenizer.decode(asked) == f"<user>{question.prompts[0]}\n<assistant>"
    assert read.tokens == read.available == sum(text.tokens for text in read.texts)


def test_the_answers_are_what_the_model_says_by_itself(session, checkpoint):
    """Rows padded in a batch get the tokens that transformers draws for each, at a temperature
    where it draws the likeliest."""
    settings = {"do_sample": True, "temperature": 1e-4}
    (checkpoint / "generation_config.json").write_text(json.dumps(settings))
    read = read_traffic(session, QUESTIONS, LIMIT, Answering(tokens=6))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for text in read.texts:
        answer = said(text)
        asked = torch.tensor([text.runs[0][: -len(answer)]])
        alone = model.generate(
            asked, attention_mask=torch.ones_like(asked), do_sample=False, max_new_tokens=6
        )
        assert alone[0, asked.shape[1] :].tolist()[: len(answer)] == answer
    (checkpoint / "generation_config.json").unlink()


def test_they_are_kept_and_depend_on_the_seed_and_the_length(session, checkpoint, tmp_path):
    first = read_traffic(session, QUESTIONS, LIMIT, Answering(tokens=5, seed=1))
    seen = []
    with show_progress(lambda what, total: seen.append(what) or nullcontext(print)):
        again = read_traffic(open_session(str(checkpoint)), QUESTIONS, LIMIT, Answering(5, 1))
    assert again == first
    assert seen == []
    other = read_traffic(session, QUESTIONS, LIMIT, Answering(tokens=5, seed=2))
    assert other != first
    assert len(list((tmp_path / "cache" / "answers").glob("*.safetensors"))) == 2


def test_what_was_said_is_taken_as_it_is(session):
    messages = (Message("user", "1?"), Message("assistant", " Yes."), Message("user", "2?"))
    chat = Conversation((*messages, Message("assistant", "No.")), chat=True)
    (read,) = read_traffic(session, [chat], LIMIT, Answering()).texts
    assert session.tokenizer.decode(said(read)) == "Yes.No."
    (batch,) = token_batches(session.tokenizer, [read])
    assert int(batch.predicted.sum()) == len(said(read))


def test_answers_that_are_given_are_read(session):
    """In the template, also where the dense model answers nothing; other prompts are then read as
    text."""
    first, *others = QUESTIONS
    given = [replace(first, given=("It is.",)), *others]
    answered = read_traffic(session, given, LIMIT, Answering(tokens=5)).texts
    assert session.tokenizer.decode(said(answered[-1])) == "It is."
    assert all(text.answers for text in answered)
    told, *plain_ones = read_traffic(session, given, LIMIT, Answering(tokens=0)).texts
    assert told == answered[-1]
    assert plain_ones == token_texts(session.tokenizer, others)


def test_documents_and_models_without_answers_are_read_as_text(session):
    long = plain("word " * WINDOW)
    read = read_traffic(session, [long], LIMIT, Answering(tokens=9))
    assert read.texts[0].answers is None
    none = read_traffic(session, QUESTIONS, LIMIT, Answering(tokens=0))
    assert list(none.texts) == token_texts(session.tokenizer, QUESTIONS)


def test_many_prompts_are_asked_in_part(session):
    many = [plain(f"Question {n}?") for n in range(40)]
    read = read_traffic(session, many, LIMIT, Answering(tokens=3, most=10))
    assert len(read.texts) == 10
    assert read.tokens < read.available


def test_what_is_read_in_another_way_is_said(session, caplog, monkeypatch):
    """Of both parts together, and once."""
    long = plain("word " * WINDOW)
    chat = Conversation((Message("user", "One?"), Message("assistant", "Two.")), chat=True)
    template = session.tokenizer.chat_template.replace("m['content']", "m['content'].upper()")
    answering = Answering(tokens=4, most=3)
    parts = ([*QUESTIONS, plain("Four?"), long, chat], [plain("Five?"), chat])
    scenario = Halves(*map(tuple, parts))
    for _ in range(2):
        scenario_traffic(session, scenario, LIMIT, answering)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[0] for line in lines] == [
        "prompts that are not read",
        "prompts that are read as text, without answers",
    ]
    caplog.clear()
    monkeypatch.setattr(session.tokenizer._tokenizer, "chat_template", template)
    scenario_traffic(session, Halves((chat,), (chat, chat)), LIMIT, answering)
    assert "conversations that count whole, and not their answers alone: 3." in caplog.text


def test_a_text_is_cut_with_its_marks():
    text = TokenText((tuple(range(5)),), (b"\0\0\1\1\1",))
    assert [piece.answers for piece in text.pieces(3)] == [(b"\0\0\1",), (b"\1\1",)]
    assert text.beginning(3).answers == (b"\0\0\1",)

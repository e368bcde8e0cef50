"""Batched answers against one prompt at a time, and the likelihood of the right ones."""

from __future__ import annotations

import json

import pytest
import torch
from factories import mask_in_torch
from tiny import make_tiny

from spp_export.data.scenario import read_scenario
from spp_export.evaluation.harness.generation import (
    MAX_PROMPT_TOKENS,
    answer_nll,
    answer_row,
    generate,
    model_stop_tokens,
    question_set,
)

pytestmark = pytest.mark.thinned(most=3)

PROMPTS = ("Why?", "What is the lightest element of all of them?", "a", "Name a metal, please.")
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[go]{% endif %}"
)


def conversations():
    """Two conversations; one turn is without an answer."""

    def turn(prompt, answer=None, kind="factual"):
        return {"prompt": prompt, "answer": answer, "task_type": kind}

    first = [
        turn("One?", "uno"),
        turn("Two?"),
        turn("Three? A) tres B) dos", "A", "multiple_choice"),
    ]
    return [{"turns": first}, {"turns": [turn("Four?", "quattro")]}]


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2", "qwen3"])
def tiny(request, tmp_path_factory):
    options = {"sliding_window": 6} if request.param == "mistral" else {}
    return make_tiny(tmp_path_factory.mktemp("generation"), request.param, **options)


@pytest.fixture
def quiz(tmp_path):
    path = tmp_path / "quiz.json"
    path.write_text(json.dumps(conversations()))
    return read_scenario(path)


@torch.no_grad()
def one_at_a_time(model, ids, count, stop):
    """Greedy by the definition: the whole sequence again for every token, no cache, no padding."""
    made = []
    for _ in range(count):
        token = int(model(torch.tensor([[*ids, *made]]), use_cache=False).logits[0, -1].argmax())
        if token in stop:
            break
        made.append(token)
    return made


@pytest.mark.parametrize("batch_tokens", [None, 60])
def test_padding_and_batches_change_no_answer(tiny, batch_tokens):
    ids = [tiny.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    with mask_in_torch(tiny.model, tiny.layers) as model:
        expected = [one_at_a_time(model, row, 12, frozenset({2})) for row in ids]
        found = generate(model, ids, 12, frozenset({2}), batch_tokens=batch_tokens)
    assert found == expected


def test_an_answer_ends_before_its_stop_token(tiny):
    ids = [tiny.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    free = generate(tiny.model, ids, 12, frozenset())
    stop = frozenset({free[1][4]})
    found = generate(tiny.model, ids, 12, stop)
    for row, unstopped in zip(found, free, strict=True):
        cut = min((unstopped.index(token) for token in stop if token in unstopped), default=12)
        assert row == unstopped[:cut]
    assert len(found[1]) <= 4


def test_stop_tokens_are_the_models_and_the_tokenizers(tiny):
    assert model_stop_tokens(tiny.model, tiny.tokenizer) == {2}


def test_the_likelihood_of_an_answer_is_that_of_its_tokens(tiny, quiz):
    questions = question_set(tiny.tokenizer, quiz).questions
    found = answer_nll(tiny.model, questions)
    for question, nll in zip(questions, found, strict=True):
        ids = torch.tensor([[*question.prompt_ids, *question.answer_ids]])
        labels = ids.clone()
        labels[0, : len(question.prompt_ids)] = -100
        with torch.no_grad():
            loss = float(tiny.model(ids, labels=labels).loss)
        assert nll == pytest.approx(loss * len(question.answer_ids), rel=1e-5)


def test_turns_follow_the_right_answers_before_them(tiny, quiz):
    decoded = [
        (q.conversation, tiny.tokenizer.decode(q.prompt_ids), tiny.tokenizer.decode(q.answer_ids))
        for q in question_set(tiny.tokenizer, quiz).questions
    ]
    assert decoded == [
        (0, "One?\n", "uno"),
        (0, "One?\nuno\n\nThree? A) tres B) dos\n", "A"),
        (1, "Four?\n", "quattro"),
    ]


def test_a_chat_template_writes_the_prompt(tiny, quiz, monkeypatch):
    monkeypatch.setattr(tiny.tokenizer, "chat_template", TEMPLATE)
    questions = question_set(tiny.tokenizer, quiz).questions
    assert tiny.tokenizer.decode(questions[1].prompt_ids) == (
        "[user]One?[assistant]uno[user]Three? A) tres B) dos[go]"
    )


def test_the_oldest_turns_make_room(tiny, tmp_path):
    turns = [{"prompt": f"{n}" * 300, "answer": "so"} for n in range(4)]
    turns.append({"prompt": "z" * 2000, "answer": "so"})
    path = tmp_path / "long.json"
    path.write_text(json.dumps([{"turns": turns}]))
    questions = question_set(tiny.tokenizer, read_scenario(path)).questions
    texts = [tiny.tokenizer.decode(q.prompt_ids) for q in questions]
    assert [text[0] for text in texts] == ["0", "0", "1", "2", "z"]
    assert len(questions[4].prompt_ids) == MAX_PROMPT_TOKENS
    assert texts[4].endswith("z\n")


def test_answers_are_counted_by_conversation(tiny, quiz, monkeypatch):
    from spp_export.evaluation.harness import generation

    said = {"One?\n": "UNO!", "Four?\n": "four"}

    def fake(model, prompts, *_rest, **_more):
        texts = [tiny.tokenizer.decode(ids) for ids in prompts]
        return [tiny.tokenizer(said.get(text, "B) dos"))["input_ids"] for text in texts]

    monkeypatch.setattr(generation, "generate", fake)
    asked = question_set(tiny.tokenizer, quiz)
    found = answer_row([asked], tiny.tokenizer, lambda: mask_in_torch(tiny.model, tiny.layers))
    counts = found["quiz.json"]
    assert counts["turns"] == [2, 1]
    assert counts["recall"] == [1, 0]
    assert counts["match"] == [1, 0]
    assert counts["choices"] == [1, 0]
    assert counts["option"] == [0, 0]
    assert counts["answer_tokens"] == [4, 7]
    summary = counts["summary"]
    assert summary["recall"][0] == pytest.approx(1 / 3)
    assert summary["option"][0] == 0
    assert summary["answer_nll"][0] == pytest.approx(sum(counts["answer_nll"]) / 11)

"""Greedy agreement in one pass, against greedy answers of both models token by token."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from factories import mask_in_torch
from tiny import make_tiny

from spp_export.calibration.reading import TokenText, dialogue_text
from spp_export.evaluation.harness import greedy
from spp_export.evaluation.harness.generation import generate, model_stop_tokens
from spp_export.evaluation.harness.greedy import GreedyReference
from spp_export.evaluation.harness.inputs import EvaluationText

PROMPTS = ("Why?", "What is the lightest element of all of them?", "a", "Name a metal, please.")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("greedy"))


def text_of(tiny, prompts, answer=5):
    """A text as it was read: prompts with answers that no greedy model gives."""
    ids = [tiny.tokenizer(prompt)["input_ids"] for prompt in prompts]
    read = tuple(dialogue_text((*prompt, *[7] * answer), answer) for prompt in ids)
    return EvaluationText("held out", (), None, read)


@torch.no_grad()
def common_beginning(dense, slim):
    """Tokens before two answers differ."""
    same = [a == b for a, b in zip(dense, slim, strict=False)]
    return same.index(False) if False in same else len(same)


def test_it_is_the_common_beginning_of_two_greedy_answers(tiny):
    reference = GreedyReference(tiny.model, tiny.tokenizer, text_of(tiny, PROMPTS), 12)
    masked = lambda: mask_in_torch(tiny.model, tiny.layers)  # noqa: E731
    found = reference.compare(masked)
    stop = model_stop_tokens(tiny.model, tiny.tokenizer)
    dense = generate(tiny.model, reference.prompts, 12, stop, with_end=True)
    with masked() as model:
        slim = generate(model, reference.prompts, 12, stop, with_end=True)
    expected = [common_beginning(*pair) for pair in zip(dense, slim, strict=True)]
    assert found["agreed"] == expected
    assert any(count < 12 for count in expected)
    assert found["tokens"] == [len(answer) for answer in dense]
    summary = found["summary"]
    assert summary["prompts"] == len(PROMPTS)
    mean, low, high = summary["agreed"]
    assert mean == pytest.approx(sum(expected) / len(PROMPTS))
    assert low <= mean <= high


def test_the_dense_model_agrees_with_itself(tiny):
    reference = GreedyReference(tiny.model, tiny.tokenizer, text_of(tiny, PROMPTS), 12)
    found = reference.compare(lambda: nullcontext(tiny.model))
    assert found["agreed"] == found["tokens"]


def test_the_token_that_ends_an_answer_counts(tiny, monkeypatch):
    text = text_of(tiny, PROMPTS[:1])
    free = GreedyReference(tiny.model, tiny.tokenizer, text, 12).answers[0].runs[0][-12:]
    end = free[3]
    monkeypatch.setattr(greedy, "model_stop_tokens", lambda *_: frozenset({end}))
    (ended,) = GreedyReference(tiny.model, tiny.tokenizer, text, 12).answers
    length = free.index(end) + 1
    assert ended.runs[0][-length:] == free[:length]
    assert sum(ended.answers[0]) == length


def test_prompts_are_those_that_were_read(tiny, caplog):
    told = TokenText(((3, 4, 5, 6, 7, 8),), (b"\0\0\1\0\0\1",))
    text = EvaluationText("t", (), None, (told, TokenText(((3, 4),))))
    assert GreedyReference(tiny.model, tiny.tokenizer, text, 12).prompts == [(3, 4)]
    assert caplog.text == ""
    long = text_of(tiny, [*PROMPTS, "x" * 505])
    assert len(GreedyReference(tiny.model, tiny.tokenizer, long, 12).prompts) == len(PROMPTS)
    assert "prompts without a greedy answer: 1. With one of 12 tokens" in caplog.text

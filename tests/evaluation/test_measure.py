"""Scores per document against transformers' own loss on each document alone, unpadded."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from factories import VOCAB, mask_in_torch
from tiny import TEXTS, make_tiny

from spp_export.common.errors import UsageError
from spp_export.data.conversation import plain
from spp_export.evaluation.harness.inputs import EvaluationText
from spp_export.evaluation.harness.measure import DenseReference, measure_row


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("measure"))


def reference(tiny, texts, **options):
    named = [EvaluationText(str(i), tuple(map(plain, t))) for i, t in enumerate(texts)]
    return DenseReference(tiny.model, tiny.tokenizer, named, VOCAB, **options)


def masked(tiny):
    return lambda: mask_in_torch(tiny.model, tiny.layers)


@torch.no_grad()
def alone(model, tokenizer, text):
    """(summed loss by transformers, log-probabilities [T-1,V]) of one text."""
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    if not text or ids.shape[1] < 2:
        return 0.0, torch.zeros(0, VOCAB, dtype=torch.float64)
    output = model(ids, labels=ids)
    return float(output.loss) * (ids.shape[1] - 1), output.logits[0, :-1].double().log_softmax(-1)


def test_every_document_scores_as_it_does_alone(tiny):
    (found,) = measure_row(reference(tiny, [TEXTS], batch_tokens=100), masked(tiny))
    for index, text in enumerate(TEXTS):
        dense, p = alone(tiny.model, tiny.tokenizer, text)
        with mask_in_torch(tiny.model, tiny.layers) as model:
            row, q = alone(model, tiny.tokenizer, text)
        assert found.tokens[index] == len(p)
        assert found.dense_nll[index] == pytest.approx(dense, rel=1e-5)
        assert found.nll[index] == pytest.approx(row, rel=1e-5)
        kl = sum(float((p[t].exp() * (p[t] - q[t])).sum()) for t in range(len(p)))
        assert found.kl[index] == pytest.approx(kl, rel=1e-4)
        assert found.agreed[index] == int((p.argmax(1) == q.argmax(1)).sum())
    assert found.kl.sum() > 1


def test_the_dense_model_loses_nothing_to_itself(tiny):
    @contextmanager
    def dense():
        yield tiny.model

    (found,) = measure_row(reference(tiny, [TEXTS]), dense)
    assert (found.kl == 0).all()
    assert (found.nll == found.dense_nll).all()
    assert (found.agreed == found.tokens).all()


@pytest.mark.parametrize("limit", [0, 40_000, 90_000, 10**9])
def test_memory_for_the_dense_model_changes_no_score(tiny, limit):
    texts = [TEXTS[:3], TEXTS[3:], TEXTS[1:]]
    options = {"batch_tokens": 40}
    expected = measure_row(reference(tiny, texts, **options), masked(tiny))
    entered = []

    @contextmanager
    def counted():
        entered.append(True)
        with mask_in_torch(tiny.model, tiny.layers) as model:
            yield model

    limited = reference(tiny, texts, limit_bytes=limit, **options)
    for _ in range(2):
        found = measure_row(limited, counted)
        for a, b in zip(found, expected, strict=True):
            for name in ("tokens", "dense_nll", "nll", "kl", "agreed"):
                assert np.array_equal(getattr(a, name), getattr(b, name)), name
    assert (len(entered) > 2) == (limit < 10**9)


def test_no_more_is_kept_than_the_limit(tiny):
    limit = 400_000
    limited = reference(tiny, [TEXTS * 3], batch_tokens=40, limit_bytes=limit)
    sizes = [sum(e.log_p.nbytes for e in group) for group in limited.groups()]
    assert len(sizes) > 2
    assert limit / 2 < sizes[0] <= 0.75 * limit
    assert max(sizes[1:]) <= 0.25 * limit


def test_the_dense_model_runs_once_where_all_of_it_fits(tiny, monkeypatch):
    kept = reference(tiny, [TEXTS])
    first = [e for group in kept.groups() for e in group]
    again = [e for group in kept.groups() for e in group]
    assert all(a is b for a, b in zip(first, again, strict=True))


def test_a_text_without_a_predicted_token_is_refused(tiny):
    with pytest.raises(UsageError, match="text 1: holds no document"):
        reference(tiny, [TEXTS, ("x", "")])

"""Perplexity and divergence against transformers' own loss and against explicit sums."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from factories import make_checkpoint, random_layers, shape_of, write_slim
from transformers import AutoTokenizer

from spp_export.calibration.activations import token_batches
from spp_export.evaluation.quality import Quality, measure_quality, next_token_log_probabilities
from spp_export.evaluation.remarks import remarks
from spp_export.models.loader import load_dense, load_slim

TEXTS = (
    "Hydrogen is the lightest element.",
    "No.",
    "x",
    "",
    "Water boils at a lower temperature on a mountain, where the air is thinner than by the sea.",
)
# predicted tokens: all but the first of each text that has one
TOKENS = sum(max(len(text) - 1, 0) for text in TEXTS)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    dense = make_checkpoint(tmp_path_factory.mktemp("quality"), "qwen3", kv_heads=2, query_heads=4)
    slim = write_slim(dense.parent / "slim", dense, random_layers(shape_of(dense), 0))
    return load_dense(dense), load_slim(slim), AutoTokenizer.from_pretrained(dense)


@torch.no_grad()
def per_text(model, tokenizer, texts):
    """Loss by transformers and log-probabilities [T-1,V] of each text alone, unpadded."""
    found = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        if text and ids.shape[1] > 1:
            output = model(ids, labels=ids)
            log_p = output.logits[0, :-1].double().log_softmax(-1)
            found.append((float(output.loss), ids.shape[1] - 1, log_p))
    return found


def test_perplexity_is_that_of_transformers_own_loss(models):
    dense, slim, tokenizer = models
    found = measure_quality(dense, slim, tokenizer, TEXTS)
    for model, perplexity in ((dense, found.dense_perplexity), (slim, found.slim_perplexity)):
        losses = per_text(model, tokenizer, TEXTS)
        total = sum(loss * tokens for loss, tokens, _ in losses)
        assert perplexity == pytest.approx(math.exp(total / TOKENS), rel=1e-5)
    assert found.tokens == TOKENS
    assert found.texts == len(TEXTS)
    assert found.ratio == found.slim_perplexity / found.dense_perplexity
    assert found.ratio != pytest.approx(1, rel=0.05)


def test_divergence_and_agreement_equal_explicit_sums(models):
    dense, slim, tokenizer = models
    found = measure_quality(dense, slim, tokenizer, TEXTS)
    pairs = zip(per_text(dense, tokenizer, TEXTS), per_text(slim, tokenizer, TEXTS), strict=True)
    divergence = agreed = 0.0
    for (_, tokens, p), (_, _, q) in pairs:
        for position in range(tokens):
            divergence += float(sum(p[position].exp() * (p[position] - q[position])))
            agreed += int(p[position].argmax()) == int(q[position].argmax())
    assert found.mean_kl == pytest.approx(divergence / TOKENS, rel=1e-4)
    assert found.top1 == pytest.approx(agreed / TOKENS)
    assert 0 < found.top1 < 1


def test_a_model_against_itself(models):
    dense, _, tokenizer = models
    found = measure_quality(dense, dense, tokenizer, TEXTS)
    assert found.mean_kl == 0
    assert found.top1 == 1
    assert found.ratio == 1


def test_divergence_is_from_the_dense_model_to_the_slim_one(models):
    dense, slim, tokenizer = models
    there = measure_quality(dense, slim, tokenizer, TEXTS)
    back = measure_quality(slim, dense, tokenizer, TEXTS)
    assert there.mean_kl != pytest.approx(back.mean_kl, rel=1e-3)
    assert there.ratio == pytest.approx(1 / back.ratio)


@pytest.mark.parametrize("budget", [1, 60, 4096])
def test_how_texts_are_batched_does_not_matter(models, monkeypatch, budget):
    dense, slim, tokenizer = models
    expected = measure_quality(dense, slim, tokenizer, TEXTS)
    monkeypatch.setattr("spp_export.evaluation.quality._BATCH_TOKENS", budget)
    found = measure_quality(dense, slim, tokenizer, TEXTS[::-1])
    assert found.tokens == expected.tokens
    assert found.top1 == expected.top1
    for name in ("dense_perplexity", "slim_perplexity", "mean_kl"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-5)


@pytest.mark.parametrize("texts", [(), ("",), ("x", "y")])
def test_where_no_token_can_be_predicted_there_is_no_figure(models, texts):
    dense, slim, tokenizer = models
    assert measure_quality(dense, slim, tokenizer, texts) is None


def test_log_probabilities_are_those_of_the_next_tokens(models):
    dense, _, tokenizer = models
    found = [
        next_token_log_probabilities(dense, batch) for batch in token_batches(tokenizer, TEXTS)
    ]
    log_p, targets = (torch.cat(of_batches) for of_batches in zip(*found, strict=True))
    order = sorted((text for text in TEXTS if text), key=len)
    expected = [i for text in order for i in tokenizer(text)["input_ids"][1:]]
    assert targets.tolist() == expected
    assert log_p.shape == (TOKENS, dense.config.vocab_size)
    assert log_p.dtype == torch.float32
    rows = torch.cat([log_p for _, _, log_p in per_text(dense, tokenizer, order)])
    torch.testing.assert_close(log_p.double(), rows, rtol=1e-5, atol=1e-5)


def test_half_precision_is_summed_in_more(models):
    dense, slim, tokenizer = models
    expected = measure_quality(dense, slim, tokenizer, TEXTS)
    halves = []
    for model in (dense, slim):
        config = model.config
        half = type(model)(config).to(torch.bfloat16).eval()
        half.load_state_dict(model.state_dict())
        halves.append(half)
    found = measure_quality(*halves, tokenizer, TEXTS)
    assert found.slim_perplexity == pytest.approx(expected.slim_perplexity, rel=0.05)
    assert found.mean_kl == pytest.approx(expected.mean_kl, rel=0.1)


@pytest.mark.parametrize(("factor", "perplexity"), [(1e6, math.inf), (math.nan, math.nan)])
def test_a_broken_model_has_a_figure_too(models, factor, perplexity):
    dense, slim, tokenizer = models
    handle = slim.lm_head.register_forward_hook(lambda _, args, output: output * factor)
    try:
        found = measure_quality(dense, slim, tokenizer, TEXTS)
    finally:
        handle.remove()
    assert found.slim_perplexity == pytest.approx(perplexity, nan_ok=True)
    assert found.dense_perplexity < 1000


def test_the_record_has_every_figure():
    quality = Quality(3, 10, 20.0, 30.0, 0.5, 0.25, {"mean_kl": (0.25, 0.75)}, "some text")
    assert quality.to_dict() == {
        "texts": 3,
        "tokens": 10,
        "dense_perplexity": 20.0,
        "slim_perplexity": 30.0,
        "mean_kl": 0.5,
        "top1": 0.25,
        "ratio": 1.5,
        "intervals": {"mean_kl": [0.25, 0.75]},
        "source": "some text",
        "uncertain": True,
    }


@pytest.mark.parametrize(("tokens", "uncertain"), [(1, True), (1999, True), (2000, False)])
def test_little_text_is_called_uncertain(tokens, uncertain):
    assert Quality(3, tokens, 20.0, 30.0, 0.01, 0.9).to_dict()["uncertain"] == uncertain
    said = remarks(tokens, 0.01)
    assert said == (["uncertain: measured on fewer than 2,000 tokens"] if uncertain else [])


@pytest.mark.parametrize(
    ("kl", "noticeable"), [(0.0, 0), (0.0999, 0), (0.1, 1), (3.0, 1), (None, 1)]
)
def test_a_distance_that_users_notice_is_told(kl, noticeable):
    assert len(remarks(10_000, kl)) == noticeable


def test_intervals_are_those_of_texts_drawn_again(models):
    """Figures of each text alone, drawn with replacement, one by one."""
    dense, slim, tokenizer = models
    texts = [text for text in TEXTS if len(text) > 1]
    found = measure_quality(dense, slim, tokenizer, texts)
    alone = [measure_quality(dense, slim, tokenizer, [text]) for text in texts]
    assert all(quality.intervals == {} for quality in alone)
    generator = np.random.default_rng(1)
    for name in ("mean_kl", "top1", "ratio"):
        drawn = []
        for _ in range(2000):
            some = [alone[i] for i in generator.integers(len(alone), size=len(alone))]
            tokens = sum(quality.tokens for quality in some)
            if name == "ratio":
                logs = sum(quality.tokens * math.log(quality.ratio) for quality in some)
                drawn.append(math.exp(logs / tokens))
            else:
                drawn.append(sum(q.tokens * getattr(q, name) for q in some) / tokens)
        low, high = np.percentile(drawn, (2.5, 97.5))
        assert low < high
        assert found.intervals[name] == pytest.approx((low, high), rel=0.1)
        assert found.intervals[name][0] <= getattr(found, name) <= found.intervals[name][1]

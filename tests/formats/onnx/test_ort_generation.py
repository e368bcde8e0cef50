"""Greedy tokens are transformers', samplers draw from the distribution they say they draw from."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from exported_onnx import ALL, WINDOWED, Pair, few_of, pair, random_ids
from numpy.typing import NDArray
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from spp_export.common.errors import CheckpointError, UsageError
from spp_export.formats.onnx.options import ATTENTIONS, Attention
from spp_export.formats.onnx.runtime import Decoding, Sampling, generate, greedy

pytestmark = pytest.mark.thinned(most=4)

PROMPTS = [random_ids(length, seed=length).tolist() for length in (9, 3, 14)]
STEPS = 12


def transformers_greedy(
    both: Pair, prompt: list[int], eos: list[int] | None = None, min_new_tokens: int = 0
) -> list[int]:
    """The same by the library that the slim checkpoint is for."""
    found = both.reference.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=STEPS,
        min_new_tokens=min_new_tokens,
        eos_token_id=eos,
        pad_token_id=0,
    )
    return [int(token) for token in found[0, len(prompt) :]]


@pytest.mark.parametrize(("case", "form"), few_of(ALL))
def test_greedy_tokens_are_those_of_transformers(case: str, form: Attention) -> None:
    both = pair(case, form)
    steps = list(generate(both.model, PROMPTS, max_new_tokens=STEPS))
    expected = [transformers_greedy(both, prompt) for prompt in PROMPTS]
    assert [list(row) for row in zip(*steps, strict=True)] == expected


@pytest.mark.parametrize("form", ATTENTIONS)
@pytest.mark.parametrize("at_least", [0, 5])
def test_rows_end_on_their_own(form: Attention, at_least: int) -> None:
    both = pair(WINDOWED, form)
    # Ends two rows, at different steps.
    free = [transformers_greedy(both, prompt) for prompt in PROMPTS]
    eos = [free[0][2], free[2][6]]
    steps = list(
        generate(both.model, PROMPTS, max_new_tokens=STEPS, eos=eos, min_new_tokens=at_least)
    )
    rows = [list(row) for row in zip(*steps, strict=True)]
    expected = [transformers_greedy(both, prompt, eos, at_least) for prompt in PROMPTS]
    assert len({len(row) for row in expected}) > 1
    for row, tokens in zip(rows, expected, strict=True):
        assert row == tokens + [None] * (len(steps) - len(tokens))


def test_it_stops_when_all_rows_have_ended() -> None:
    both = pair(WINDOWED, "gqa")
    free = transformers_greedy(both, PROMPTS[0])
    eos = {free[3]}
    expected = free[: free.index(free[3]) + 1]
    steps = list(generate(both.model, [PROMPTS[0]] * 2, max_new_tokens=STEPS, eos=eos))
    assert steps == [[token, token] for token in expected]


def test_eos_beyond_the_vocabulary_never_comes() -> None:
    model = pair(WINDOWED, "gqa").model
    options = {"max_new_tokens": 4, "min_new_tokens": 2}
    free = list(generate(model, PROMPTS, **options))
    assert list(generate(model, PROMPTS, eos=(-1, 263, 10**6), **options)) == free


def test_tokens_come_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    feed = Decoding.feed

    def counted(self: Decoding, ids: NDArray[np.int64], *rest: object) -> NDArray[np.float32]:
        lengths.append(np.shape(ids)[1])
        return feed(self, ids, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Decoding, "feed", counted)
    stream = generate(pair(WINDOWED, "gqa").model, PROMPTS, max_new_tokens=3)
    assert lengths == []
    next(stream)
    assert lengths == [14]
    next(stream)
    assert lengths == [14, 1]
    assert len(list(stream)) == 1
    assert lengths == [14, 1, 1]


@pytest.mark.parametrize("form", ATTENTIONS)
def test_the_last_token_may_fill_the_context(form: Attention) -> None:
    model = pair(WINDOWED, form).model
    prompt = random_ids(1020).tolist()
    assert len(list(generate(model, [prompt], max_new_tokens=5))) == 5
    with pytest.raises(UsageError, match="more than the 1024"):
        generate(model, [prompt], max_new_tokens=6)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "empty"),
        ([[1], []], {}, "empty"),
        ([[1, 263]], {}, "vocabulary of 263"),
        ([[-1]], {}, "vocabulary of 263"),
        ([[1]], {"max_new_tokens": 0}, "at least 1 and 0"),
        ([[1]], {"min_new_tokens": -1}, "at least 1 and 0"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(
    prompts: list[list[int]], options: dict[str, int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        generate(pair(WINDOWED, "gqa").model, prompts, **{"max_new_tokens": 2, **options})


def test_logits_that_are_no_numbers_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Decoding, ids: NDArray[np.int64], *rest: object) -> NDArray[np.float32]:
        return np.full((*np.shape(ids), 263), np.nan, np.float32)

    monkeypatch.setattr(Decoding, "feed", broken)
    with pytest.raises(CheckpointError, match="not finite"):
        next(generate(pair(WINDOWED, "gqa").model, [[5]], max_new_tokens=2))


def test_sampling_is_repeated_by_its_seed() -> None:
    model = pair(WINDOWED, "gqa").model

    def sample(seed: int) -> list[list[int | None]]:
        choose = Sampling(temperature=1.5, top_k=50, top_p=0.95, seed=seed)
        return list(generate(model, PROMPTS, max_new_tokens=8, choose=choose))

    assert sample(3) == sample(3)
    assert sample(3) != sample(4)


def test_sampling_goes_on_where_it_was() -> None:
    logits = np.zeros((1, 100))
    choose, again = Sampling(temperature=1.0), Sampling(temperature=1.0)
    first, second = choose(np.tile(logits, (8, 1))), choose(np.tile(logits, (8, 1)))
    assert list(first) != list(second)
    assert list(again(np.tile(logits, (8, 1)))) == list(first)


def test_temperature_zero_is_greedy() -> None:
    logits = np.random.default_rng(0).normal(size=(20, 30)).astype(np.float32)
    np.testing.assert_array_equal(Sampling(0.0, top_k=5, top_p=0.5)(logits), logits.argmax(-1))
    np.testing.assert_array_equal(greedy(logits), logits.argmax(-1))
    np.testing.assert_array_equal(Sampling(1e-300, seed=1)(logits), logits.argmax(-1))
    assert greedy(np.array([[1.0, 3.0, 3.0]])).tolist() == [1]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    list(itertools.product([0.3, 1.0, 2.5], [0, 1, 7, 40, 99], [0.1, 0.8, 1.0])),
)
def test_candidates_are_those_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(5).normal(scale=3, size=40).astype(np.float32)
    logits[[3, 9, 20]] = logits[11]  # equals
    chain = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        chain.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        chain.append(TopPLogitsWarper(top_p))
    ids = torch.zeros((1, 1), dtype=torch.long)
    expected = chain(ids, torch.from_numpy(logits)[None].double()).softmax(-1)[0].numpy()
    tokens, chances = Sampling(temperature, top_k, top_p).candidates(logits)
    found = np.zeros(40)
    found[tokens] = chances
    assert len(set(tokens.tolist())) == len(tokens) == (expected > 0).sum()
    np.testing.assert_allclose(np.sort(found), np.sort(expected), atol=1e-12)
    distinct = np.setdiff1d(np.arange(40), [3, 9, 11, 20])  # which equal goes first is free
    np.testing.assert_allclose(found[distinct], expected[distinct], atol=1e-12)


def test_a_forbidden_token_is_never_drawn() -> None:
    logits = np.array([[2.0, -np.inf, 0.0]] * 500)
    assert 1 not in Sampling(temperature=5.0, seed=2)(logits)


def test_draws_follow_the_chances() -> None:
    logits = np.array([1.0, 0.0, -1.0, 2.0, 0.5, -4.0])
    count = 20_000
    choose = Sampling(temperature=0.8, top_k=5, top_p=0.95, seed=11)
    drawn = np.bincount(choose(np.tile(logits, (count, 1))), minlength=6) / count
    # By hand: top-k drops the last one; of the others the third has 0.015, below 1 - top-p.
    weights = np.exp(logits / 0.8) * [1, 1, 0, 1, 1, 0]
    expected = weights / weights.sum()
    spread = np.sqrt(expected * (1 - expected) / count)
    assert (abs(drawn - expected) <= 4 * spread).all()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": float("nan")},
        {"seed": -1},
    ],
)
def test_sampling_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="expected"):
        Sampling(**options)  # type: ignore[arg-type]

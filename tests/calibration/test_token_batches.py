"""How texts become batches: nothing lost, nothing padded beyond need, the budget kept."""

from __future__ import annotations

import torch
from factories import make_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from spp_export.calibration.activations import _BATCH_COST, token_batches
from spp_export.common.options import WINDOW


class Letters:
    """A tokenizer of one token per letter, called as transformers' are."""

    def __call__(self, texts, *, verbose):
        assert not verbose
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


@settings(deadline=None)
@given(
    texts=st.lists(st.text("abc", max_size=30), max_size=25),
    window=st.integers(1, 40),
    budget=st.integers(1, 120),
)
def test_batches_hold_every_piece_once_within_the_budget(texts, window, budget):
    batches = token_batches(Letters(), texts, window=window, batch_tokens=budget)
    pieces = sorted(
        (min(window, len(text) - start), index, text[start : start + window])
        for index, text in enumerate(texts)
        for start in range(0, len(text), window)
    )
    rows = [
        (int(mask.sum()), index, "".join(map(chr, ids[mask.bool()].tolist())))
        for batch in batches
        for index, ids, mask in zip(batch.texts, batch.input_ids, batch.attention_mask, strict=True)
    ]
    assert sorted(rows) == sorted(pieces)
    assert [row[0] for row in rows] == [piece[0] for piece in pieces]
    for batch in batches:
        rows, width = batch.input_ids.shape
        assert rows == len(batch.texts)
        lengths = batch.attention_mask.sum(1).tolist()
        assert width == max(lengths)
        assert rows == 1 or rows * width <= budget
        assert batch.real_tokens == sum(lengths)
        for length, mask in zip(lengths, batch.attention_mask, strict=True):
            assert mask.tolist() == [1] * length + [0] * (width - length)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 400), max_size=9), budget=st.integers(1, 900))
def test_batches_end_where_that_costs_least(lengths, budget):
    lengths = sorted(lengths)

    def cost(batches):
        """None where a batch breaks the budget."""
        if any(len(batch) > 1 and len(batch) * batch[-1] > budget for batch in batches):
            return None
        return sum(len(batch) * batch[-1] + _BATCH_COST for batch in batches)

    def cuts(pieces):
        """Every way of cutting a list."""
        if not pieces:
            yield []
        for end in range(1, len(pieces) + 1):
            for rest in cuts(pieces[end:]):
                yield [pieces[:end], *rest]

    made = token_batches(Letters(), ["a" * length for length in lengths], batch_tokens=budget)
    found = cost([batch.attention_mask.sum(1).tolist() for batch in made])
    assert found == min(filter(lambda one: one is not None, map(cost, cuts(lengths))))


def test_a_real_tokenizer_cuts_and_leaves_empty_texts_out(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(
        make_checkpoint(tmp_path, "llama", kv_heads=1, query_heads=2, layers=1)
    )
    texts = ["", "a", "é", "x" * WINDOW + "y" * 90]
    batches = token_batches(tokenizer, texts, batch_tokens=4)
    assert [batch.texts for batch in batches] == [(1, 2), (3,), (3,)]
    assert batches[0].attention_mask.tolist() == [[1, 0], [1, 1]]
    assert [batch.input_ids.shape for batch in batches[1:]] == [(1, 90), (1, WINDOW)]
    assert batches[0].input_ids.dtype == torch.long
    # a byte-level tokenizer: the pieces are the text
    assert [tokenizer.decode(batch.input_ids[0]) for batch in batches[1:]] == [
        "y" * 90,
        "x" * WINDOW,
    ]


def test_no_text_is_no_batch():
    assert token_batches(Letters(), []) == []
    assert token_batches(Letters(), ["", ""]) == []

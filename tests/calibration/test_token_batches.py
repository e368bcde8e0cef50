"""How texts become batches: nothing lost, nothing padded beyond need, the budget kept."""

from __future__ import annotations

from itertools import pairwise

import torch
from factories import make_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from spp_export.calibration.activations import MAX_TOKENS, token_batches


class Letters:
    """A tokenizer of one token per letter, called as transformers' are."""

    def __call__(self, text, *, truncation, max_length):
        assert truncation
        return {"input_ids": [ord(letter) for letter in text][:max_length]}


@settings(deadline=None)
@given(
    texts=st.lists(st.text("abc", max_size=30), max_size=25),
    max_tokens=st.integers(1, 40),
    budget=st.integers(1, 120),
)
def test_batches_hold_every_text_once_within_the_budget(texts, max_tokens, budget):
    batches = token_batches(Letters(), texts, max_tokens=max_tokens, batch_tokens=budget)
    order = [index for batch in batches for index in batch.texts]
    lengths = {i: min(len(text), max_tokens) for i, text in enumerate(texts) if text}
    assert order == sorted(lengths, key=lambda i: (lengths[i], i))
    for batch in batches:
        rows, width = batch.input_ids.shape
        assert rows == len(batch.texts)
        assert width == max(lengths[i] for i in batch.texts)
        assert rows == 1 or rows * width <= budget
        assert batch.real_tokens == sum(lengths[i] for i in batch.texts)
        for index, ids, mask in zip(
            batch.texts, batch.input_ids, batch.attention_mask, strict=True
        ):
            length = lengths[index]
            assert mask.tolist() == [1] * length + [0] * (width - length)
            assert ids[:length].tolist() == [ord(letter) for letter in texts[index][:length]]
    for batch, following in pairwise(batches):
        # a batch ends only where one more text would break the budget
        assert (len(batch.texts) + 1) * lengths[following.texts[0]] > budget


def test_a_real_tokenizer_truncates_and_leaves_empty_texts_out(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(
        make_checkpoint(tmp_path, "llama", kv_heads=1, query_heads=2, layers=1)
    )
    texts = ["", "a", "é", "x" * (MAX_TOKENS + 90)]
    batches = token_batches(tokenizer, texts, batch_tokens=4)
    assert [batch.texts for batch in batches] == [(1, 2), (3,)]
    assert batches[0].attention_mask.tolist() == [[1, 0], [1, 1]]
    assert batches[1].input_ids.shape == (1, MAX_TOKENS)
    assert batches[0].input_ids.dtype == torch.long
    for batch in batches:
        for index, ids, mask in zip(
            batch.texts, batch.input_ids, batch.attention_mask, strict=True
        ):
            # a byte-level tokenizer: what is cut off is the end
            assert texts[index].startswith(tokenizer.decode(ids[mask.bool()]))


def test_no_text_is_no_batch():
    assert token_batches(Letters(), []) == []
    assert token_batches(Letters(), ["", ""]) == []

"""The reference of ragged attention against torch's attention, one query head at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from spp_kernels.ragged_attention import ragged_attention

# groups of equal size, of different sizes, out of order, one without heads, one for all
GROUPS = [[0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 2], [2, 0, 1, 0, 0, 2], [0, 0, 0, 2, 2], [0] * 7]
# (Tq, Tk): one token, odd sizes, a decoding step, several new tokens on a cache
LENGTHS = [(1, 1), (7, 7), (63, 63), (1, 37), (5, 19)]


def tensors(heads, queries, keys, *, batch=2, groups=3, width=20, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    key_shape = (batch, groups, keys, width)
    return normal(batch, heads, queries, width), normal(*key_shape), normal(*key_shape)


def torch_head(query, key, value, head, group, mask, scale=None):
    """torch's attention of one head [B,Tq,D]; mask [B,Tq,Tk] is True where a key is seen."""
    one = (query[:, head : head + 1], key[:, group : group + 1], value[:, group : group + 1])
    return scaled_dot_product_attention(*one, attn_mask=mask[:, None], scale=scale)[:, 0]


def seen(batch, queries, keys, causal=True, padding=None):
    """The same rule, spelled out position by position."""
    mask = torch.zeros(batch, queries, keys, dtype=torch.bool)
    for b in range(batch):
        for i in range(queries):
            for j in range(keys):
                past = j <= keys - queries + i
                real = padding is None or not padding[b, j]
                mask[b, i, j] = real and (past or not causal)
    return mask


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_every_head_equals_torch_attention_with_its_group(groups, lengths, causal):
    query, key, value = tensors(len(groups), *lengths)
    found = ragged_attention(query, key, value, groups, causal=causal)
    mask = seen(2, *lengths, causal)
    for head, group in enumerate(groups):
        expected = torch_head(query, key, value, head, group, mask)
        torch.testing.assert_close(found[:, head], expected, rtol=1e-12, atol=1e-13)


def test_equal_groups_are_grouped_query_attention():
    query, key, value = tensors(6, 17, 17, width=8)
    expected = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    found = ragged_attention(query, key, value, [0, 0, 1, 1, 2, 2])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_scale_can_be_given():
    query, key, value = tensors(4, 9, 9)
    groups = [0, 0, 1, 2]
    found = ragged_attention(query, key, value, groups, scale=0.3)
    assert not torch.allclose(found, ragged_attention(query, key, value, groups))
    for head, group in enumerate(groups):
        expected = torch_head(query, key, value, head, group, seen(2, 9, 9), scale=0.3)
        torch.testing.assert_close(found[:, head], expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("queries", [11, 3, 1])
def test_left_padding_equals_the_row_without_it(queries):
    groups, padded = [0, 1, 1, 2, 2], 4
    query, key, value = tensors(5, queries, 11)
    padding = torch.zeros(2, 11, dtype=torch.bool)
    padding[0, :padded] = True
    found = ragged_attention(query, key, value, groups, key_padding=padding)
    real = min(queries, 11 - padded)
    short = (query[:1, :, queries - real :], key[:1, :, padded:], value[:1, :, padded:])
    alone = ragged_attention(*short, groups)
    torch.testing.assert_close(found[:1, :, queries - real :], alone, rtol=1e-12, atol=1e-13)
    full = ragged_attention(query[1:], key[1:], value[1:], groups)
    assert torch.equal(found[1:], full)


@pytest.mark.parametrize("where", [slice(0, 3), slice(8, 10), slice(4, 6)])
def test_padding_anywhere_equals_torch_with_a_mask(where):
    query, key, value = tensors(4, 10, 10)
    padding = torch.zeros(2, 10, dtype=torch.bool)
    padding[1, where] = True
    found = ragged_attention(query, key, value, [0, 2, 2, 2], key_padding=padding)
    mask = seen(2, 10, 10, padding=padding)
    rows = mask.any(dim=2)
    for head, group in enumerate([0, 2, 2, 2]):
        expected = torch_head(query, key, value, head, group, mask)
        torch.testing.assert_close(found[:, head][rows], expected[rows], rtol=1e-12, atol=1e-13)
        assert (found[:, head][~rows] == 0).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("causal", [True, False])
def test_what_padding_holds_has_no_effect(poison, causal):
    query, key, value = tensors(5, 6, 9)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[0, :4] = True
    padding[1, 2] = True
    options = {"causal": causal, "key_padding": padding}
    clean = ragged_attention(query, key, value, [0, 0, 1, 2, 2], **options)
    hole = padding[:, None, :, None].expand_as(key)
    key, value = key.masked_fill(hole, poison), value.masked_fill(hole, poison)
    assert torch.equal(ragged_attention(query, key, value, [0, 0, 1, 2, 2], **options), clean)
    assert clean.isfinite().all()


def test_rows_that_see_nothing_are_zero():
    query, key, value = tensors(2, 3, 3, batch=1)
    padding = torch.tensor([[True, True, False]])
    found = ragged_attention(query, key, value, [0, 1], key_padding=padding)
    assert (found[:, :, :2] == 0).all()
    torch.testing.assert_close(found[:, :, 2], value[:, :2, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_types_are_computed_in_float32(dtype):
    query, key, value = tensors(5, 33, 33, dtype=dtype)
    groups = [0, 1, 1, 1, 2]
    found = ragged_attention(query, key, value, groups)
    assert found.dtype == dtype
    exact = ragged_attention(query.double(), key.double(), value.double(), groups)
    # rounding of the result alone, and what float32 adds
    allowed = exact.abs() * torch.finfo(dtype).eps / 2 + 1e-5
    assert ((found.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 4, 5)}, "4 axes"),
        ({"key": torch.zeros(2, 3, 5, 6)}, r"\[2, G, Tk, 8\]"),
        ({"value": torch.zeros(2, 3, 4, 8)}, "got .*4, 8"),
        ({"group_of_query": [0, 1, 2]}, "each of 4 query heads"),
        ({"group_of_query": [0, 1, 2, 3]}, "one of 3 groups"),
        ({"group_of_query": [0, 1, 2, -1]}, "one of 3 groups"),
        ({"query": torch.zeros(2, 4, 6, 8)}, "6 queries .* got 5"),
        ({"key_padding": torch.zeros(2, 4, dtype=torch.bool)}, r"bool \[2, 5\]"),
        ({"key_padding": torch.zeros(2, 5)}, r"bool \[2, 5\], got torch.float32"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message):
    arguments = {
        "query": torch.zeros(2, 4, 5, 8),
        "key": torch.zeros(2, 3, 5, 8),
        "value": torch.zeros(2, 3, 5, 8),
        "group_of_query": [0, 0, 1, 2],
    }
    ragged_attention(**arguments)
    with pytest.raises(ValueError, match=message):
        ragged_attention(**{**arguments, **change})


def test_more_queries_than_keys_are_fine_without_causality():
    query, key, value = tensors(2, 5, 3)
    found = ragged_attention(query, key, value, [0, 2], causal=False)
    expected = torch_head(query, key, value, 1, 2, seen(2, 5, 3, causal=False))
    torch.testing.assert_close(found[:, 1], expected, rtol=1e-12, atol=1e-13)

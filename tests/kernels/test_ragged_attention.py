"""The definition of ragged attention against torch's attention, one query head at a time."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from spp_kernels import ragged_attention as package

ragged_attention = partial(package.ragged_attention, implementation="naive")

# groups of equal size, of different sizes, out of order, one without heads, one for all
GROUPS = [[0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 2], [2, 0, 1, 0, 0, 2], [0, 0, 0, 2, 2], [0] * 7]
# (S, T): one token, odd sizes, a decoding step, several new tokens on a cache
LENGTHS = [(1, 1), (7, 7), (63, 63), (1, 37), (5, 19)]


def tensors(heads, queries, keys, *, batch=2, groups=3, width=20, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    key_shape = (batch, groups, keys, width)
    return normal(batch, heads, queries, width), normal(*key_shape), normal(*key_shape)


def torch_head(query, key, value, head, group, mask, scale=None):
    """torch's attention of one head [B,S,D]; mask [B,S,T] is True where a key is seen."""
    one = (query[:, head : head + 1], key[:, group : group + 1], value[:, group : group + 1])
    return scaled_dot_product_attention(*one, attn_mask=mask[:, None], scale=scale)[:, 0]


def seen(batch, queries, keys, *, causal=True, starts=None, ends=None, window=None):
    """The same rule, spelled out position by position."""
    mask = torch.zeros(batch, queries, keys, dtype=torch.bool)
    for b in range(batch):
        start = 0 if starts is None else int(starts[b])
        end = keys if ends is None else int(ends[b])
        for i in range(queries):
            own = end - queries + i
            for j in range(start, end):
                near = window is None or j > own - window
                mask[b, i, j] = near and (j <= own or not causal)
    return mask


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_every_head_equals_torch_attention_with_its_group(groups, lengths, causal):
    query, key, value = tensors(len(groups), *lengths)
    found = ragged_attention(query, key, value, groups, causal=causal)
    mask = seen(2, *lengths, causal=causal)
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
    found = ragged_attention(query, key, value, groups, starts=torch.tensor([padded, 0]))
    real = min(queries, 11 - padded)
    short = (query[:1, :, queries - real :], key[:1, :, padded:], value[:1, :, padded:])
    alone = ragged_attention(*short, groups)
    torch.testing.assert_close(found[:1, :, queries - real :], alone, rtol=1e-12, atol=1e-13)
    full = ragged_attention(query[1:], key[1:], value[1:], groups)
    assert torch.equal(found[1:], full)


@pytest.mark.parametrize("queries", [3, 1])
@pytest.mark.parametrize("causal", [True, False])
def test_a_part_filled_cache_equals_what_it_holds(queries, causal):
    groups, held = [0, 1, 1, 2, 2], 7
    query, key, value = tensors(5, queries, 11)
    ends = torch.tensor([held, 11])
    found = ragged_attention(query, key, value, groups, ends=ends, causal=causal)
    alone = ragged_attention(
        query[:1], key[:1, :, :held], value[:1, :, :held], groups, causal=causal
    )
    torch.testing.assert_close(found[:1], alone, rtol=1e-12, atol=1e-13)
    full = ragged_attention(query[1:], key[1:], value[1:], groups, causal=causal)
    assert torch.equal(found[1:], full)


@pytest.mark.parametrize(
    "options",
    [
        {"starts": torch.tensor([0, 3])},
        {"ends": torch.tensor([10, 7])},
        {"starts": torch.tensor([2, 5]), "ends": torch.tensor([9, 6])},
        {"window": 1},
        {"window": 4},
        {"window": 3, "starts": torch.tensor([8, 0]), "ends": torch.tensor([10, 4])},
        {"starts": torch.tensor([1, 4]), "causal": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("queries", [10, 4])
def test_padding_and_windows_equal_torch_with_a_mask(options, queries):
    query, key, value = tensors(4, queries, 10)
    found = ragged_attention(query, key, value, [0, 2, 2, 2], **options)
    mask = seen(2, queries, 10, **options)
    rows = mask.any(dim=2)
    for head, group in enumerate([0, 2, 2, 2]):
        expected = torch_head(query, key, value, head, group, mask)
        torch.testing.assert_close(found[:, head][rows], expected[rows], rtol=1e-12, atol=1e-13)
        assert (found[:, head][~rows] == 0).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("causal", [True, False])
def test_what_lies_outside_a_row_has_no_effect(poison, causal):
    query, key, value = tensors(5, 6, 9)
    options = {"causal": causal, "starts": torch.tensor([4, 1]), "ends": torch.tensor([9, 7])}
    clean = ragged_attention(query, key, value, [0, 0, 1, 2, 2], **options)
    for tensor in (key, value):
        tensor[0, :, :4] = tensor[1, :, :1] = tensor[1, :, 7:] = poison
    assert torch.equal(ragged_attention(query, key, value, [0, 0, 1, 2, 2], **options), clean)
    assert clean.isfinite().all()


def test_rows_that_see_nothing_are_zero():
    query, key, value = tensors(2, 3, 3, batch=1)
    found = ragged_attention(query, key, value, [0, 1], starts=torch.tensor([2]))
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
        ({"key": torch.zeros(2, 3, 5, 6)}, r"\[2, G, T, 8\]"),
        ({"value": torch.zeros(2, 3, 4, 8)}, "got .*4, 8"),
        ({"group_of_query": [0, 1, 2]}, "each of 4 query heads"),
        ({"group_of_query": [0, 1, 2, 3]}, "one of 3 groups"),
        ({"group_of_query": [0, 1, 2, -1]}, "one of 3 groups"),
        ({"query": torch.zeros(2, 4, 6, 8)}, "6 queries .* got 5"),
        ({"starts": torch.zeros(3, dtype=torch.int64)}, r"starts must be 2 integers, got .*\[3\]"),
        ({"ends": torch.zeros(2)}, "ends must be 2 integers, got torch.float32"),
        ({"window": 0}, "a window needs .* got 0"),
        ({"window": 3, "causal": False}, "a window needs causal"),
        ({"value": torch.zeros(2, 3, 5, 8, dtype=torch.float16)}, "one type, .* torch.float16"),
        ({"implementation": "fast"}, "one of auto, naive, sdpa, triton, got 'fast'"),
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

"""The re-fit by blocks: what it computes, and what of the whole re-fit it can and cannot keep."""

from __future__ import annotations

import numpy as np
import pytest

from spp_export.calibration.refit import refit, refit_blocks, residual, residual_blocks
from spp_export.common.errors import ArtifactsError, UsageError

OUTPUTS, INPUTS, SIZE, SAMPLES = 7, 23, 8, 600
# Of the first block some stay, of the second none, of the padded third some.
KEPT = np.array([0, 2, 3, 7, 17, 18, 22])


def blocks_of(moments, size=SIZE):
    """Diagonal blocks of moments [m,m], the last padded with zeros."""
    count = -(-len(moments) // size)
    found = np.zeros((count, size, size))
    for index in range(count):
        part = moments[index * size : (index + 1) * size, index * size : (index + 1) * size]
        found[index, : len(part), : len(part)] = part
    return found


def block_diagonal(moments, size=SIZE):
    same = np.arange(len(moments)) // size
    return np.where(same[:, None] == same, moments, 0.0)


def layer(seed=0, across=1.0):
    """Weights and the moments of inputs that have a mean and are correlated within their blocks,
    and with those of others by as much as `across` says."""
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((INPUTS, INPUTS))
    mixing = block_diagonal(mixing) + across * (mixing - block_diagonal(mixing))
    inputs = random.standard_normal((SAMPLES, INPUTS)) @ mixing + 0.3
    return random.standard_normal((OUTPUTS, INPUTS)), inputs.T @ inputs / SAMPLES


@pytest.mark.parametrize("ridge", [0.0, 0.01, 1.0])
def test_one_block_is_the_whole_refit(ridge):
    weight, moments = layer()
    whole = refit(weight, moments, KEPT, ridge)
    np.testing.assert_array_equal(refit_blocks(weight, moments[None], KEPT, ridge), whole)
    padded = np.pad(moments, (0, 9))[None]
    np.testing.assert_array_equal(refit_blocks(weight, padded, KEPT, ridge), whole)
    assert residual_blocks(weight, padded, KEPT, whole) == residual(weight, moments, KEPT, whole)


@pytest.mark.parametrize("size", [1, 3, 8, 22])
def test_against_a_refit_of_every_block_spelled_out(size):
    weight, moments = layer()
    found = refit_blocks(weight, blocks_of(moments, size), KEPT, 0.1)
    assert found.shape == (OUTPUTS, len(KEPT))
    for place, kept in enumerate(KEPT):
        block = range(kept // size * size, min(kept // size * size + size, INPUTS))
        stay = [index for index in KEPT if index in block]
        gone = [index for index in block if index not in KEPT]
        among = moments[np.ix_(stay, stay)]
        among = among + 0.1 * np.mean(np.diag(among)) * np.eye(len(stay))
        change = weight[:, gone] @ moments[np.ix_(gone, stay)] @ np.linalg.inv(among)
        np.testing.assert_allclose(
            found[:, place], weight[:, kept] + change[:, stay.index(kept)], rtol=1e-9
        )


def test_a_block_that_keeps_nothing_contributes_nothing():
    """Its inputs are lost whole, and nobody else is changed for them."""
    weight, moments = layer()
    found = refit_blocks(weight, blocks_of(moments), KEPT, 0.01)
    weight[:, SIZE : 2 * SIZE] *= 100
    np.testing.assert_array_equal(refit_blocks(weight, blocks_of(moments), KEPT, 0.01), found)
    none = refit_blocks(weight, blocks_of(moments), [], 0.01)
    assert none.shape == (OUTPUTS, 0)
    assert residual_blocks(weight, blocks_of(moments), [], none) == 1


def test_columns_follow_the_order_of_what_is_kept():
    weight, moments = layer()
    order = np.random.default_rng(1).permutation(len(KEPT))
    found = refit_blocks(weight, blocks_of(moments), KEPT[order], 0.01)
    expected = refit_blocks(weight, blocks_of(moments), KEPT, 0.01)[:, order]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_residual_is_that_of_the_block_diagonal_moments():
    weight, moments = layer()
    blocks, diagonal = blocks_of(moments), block_diagonal(moments)
    for slim in (weight[:, KEPT], refit_blocks(weight, blocks, KEPT, 0.01)):
        expected = residual(weight, diagonal, KEPT, slim)
        assert residual_blocks(weight, blocks, KEPT, slim) == pytest.approx(expected, rel=1e-12)
    everything = np.arange(INPUTS)
    assert residual_blocks(weight, blocks, everything, weight) == 0
    assert residual_blocks(weight, np.zeros_like(blocks), KEPT, weight[:, KEPT]) == 0


@pytest.mark.parametrize("ridge", [0.0, 0.01, 10.0])
@pytest.mark.parametrize("seed", range(5))
def test_never_worse_than_the_slice_on_its_own_moments(seed, ridge):
    weight, moments = layer(seed)
    blocks = blocks_of(moments)
    slim = refit_blocks(weight, blocks, KEPT, ridge)
    sliced = residual_blocks(weight, blocks, KEPT, weight[:, KEPT])
    assert residual_blocks(weight, blocks, KEPT, slim) <= sliced * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_where_blocks_do_not_correlate_nothing_is_given_up(seed):
    """On the whole moments: the least loss, as of the whole re-fit, without a ridge; between that
    and the slice's with one."""
    weight, moments = layer(seed)
    moments = block_diagonal(moments)
    least, slim, shrunk = (
        residual(weight, moments, KEPT, found)
        for found in (
            refit(weight, moments, KEPT, 0.0),
            refit_blocks(weight, blocks_of(moments), KEPT, 0.0),
            refit_blocks(weight, blocks_of(moments), KEPT, 0.01),
        )
    )
    sliced = residual(weight, moments, KEPT, weight[:, KEPT])
    assert slim == pytest.approx(least, rel=1e-9)
    assert least * (1 - 1e-12) <= shrunk <= sliced
    assert least < 0.95 * sliced


@pytest.mark.parametrize("seed", range(5))
def test_the_error_of_blocks_where_they_do_correlate(seed):
    """On the whole moments: never below the whole re-fit, at most n times what the blocks say, and
    with little correlation still better than the slice."""
    for across in (0.05, 1.0):
        weight, moments = layer(seed, across)
        blocks = blocks_of(moments)
        slim = refit_blocks(weight, blocks, KEPT, 0.01)
        found = residual(weight, moments, KEPT, slim)
        assert found >= residual(weight, moments, KEPT, refit(weight, moments, KEPT, 0.0))
        lost = residual_blocks(weight, blocks, KEPT, slim) * energy(weight, block_diagonal(moments))
        assert found * energy(weight, moments) <= len(blocks) * lost
        if across < 1:
            assert found < residual(weight, moments, KEPT, weight[:, KEPT])


def energy(weight, moments):
    return np.trace(weight @ moments @ weight.T)


def test_blocks_can_be_worse_than_the_slice():
    """What two blocks lose cancels out; each makes up for its own all the same."""
    random = np.random.default_rng(0)
    a, other, lost = random.standard_normal((3, SAMPLES))
    lost = lost + a
    inputs = np.stack([a, lost, other, -lost], axis=1)
    moments, weight, kept = inputs.T @ inputs / SAMPLES, np.ones((1, 4)), [0, 2]
    blocks = np.stack([moments[:2, :2], moments[2:, 2:]])
    slim = refit_blocks(weight, blocks, kept, 0.0)
    assert residual(weight, moments, kept, weight[:, kept]) < 1e-12
    assert residual(weight, moments, kept, slim) > 0.1


BAD_BLOCKS = {
    "too few": lambda blocks: blocks[1:],
    "too many": lambda blocks: np.concatenate([blocks, blocks[:1]]),
    "not square": lambda blocks: blocks[:, 1:],
    "one matrix": lambda blocks: blocks[0],
    "not finite": lambda blocks: np.where(blocks == blocks.max(), np.nan, blocks),
    "negative mean square": lambda blocks: -blocks,
}


@pytest.mark.parametrize("case", BAD_BLOCKS)
def test_bad_blocks(case):
    weight, moments = layer()
    blocks = BAD_BLOCKS[case](blocks_of(moments))
    for call in (
        lambda: refit_blocks(weight, blocks, KEPT, 0.01),
        lambda: residual_blocks(weight, blocks, KEPT, weight[:, KEPT]),
    ):
        with pytest.raises(ArtifactsError) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_bad_ridge():
    weight, moments = layer()
    with pytest.raises(UsageError):
        refit_blocks(weight, blocks_of(moments), KEPT, -1.0)

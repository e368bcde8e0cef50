"""`obs` of channels against its definition: remove, re-fit the rest by least squares, measure.

The ridge r = 0.01 mean(diag C), the mean over all channels, makes C + rI the moments throughout, as
if the inputs carried white noise of that variance.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from spp_export.importance.obs import channel_losses

RIDGE = 0.01


def moments(channels, seed=0, samples=300):
    """Second moments [I,I] of correlated gated inputs of very different sizes."""
    random = np.random.default_rng(seed)
    hidden = random.standard_normal((samples, max(channels // 3, 2)))
    gate, up = (hidden @ random.standard_normal((hidden.shape[1], channels)) for _ in range(2))
    gate = gate + 0.3 * random.standard_normal(gate.shape)
    inputs = gate / (1 + np.exp(-gate)) * up * np.exp(random.normal(0, 0.7, channels))
    return inputs.T @ inputs / samples


def weights(channels, width=9, seed=0):
    return np.random.default_rng(1000 + seed).standard_normal((width, channels))


def cut(second, size):
    """The diagonal blocks [n,b,b], zeros at the end, and the matrix with nothing else."""
    channels = len(second)
    blocks = np.zeros((-(-channels // size), size, size))
    whole = np.zeros_like(second)
    for i, start in enumerate(range(0, channels, size)):
        part = slice(start, min(start + size, channels))
        count = part.stop - start
        blocks[i, :count, :count] = whole[part, part] = second[part, part]
    return blocks, whole


def refit_error(weight, second, kept):
    """E ||W z - W' z_S||^2 of the best W', by least squares on the rows of a square root."""
    noisy = second + RIDGE * np.mean(np.diag(second)) * np.eye(len(second))
    root = np.linalg.cholesky(noisy).T  # its rows are inputs with exactly these moments
    wanted = root @ weight.T
    fit = np.linalg.lstsq(root[:, kept], wanted, rcond=None)[0]
    return np.sum((wanted - root[:, kept] @ fit) ** 2)


def widths(channels, multiple):
    return [w for w in range(1, channels) if w % multiple == 0] + [channels]


@pytest.mark.parametrize(
    ("channels", "size", "multiple"),
    [(12, 12, 1), (12, 6, 5), (13, 5, 4), (40, 16, 8), (150, 150, 16), (150, 64, 64), (5, 8, 64)],
)
@pytest.mark.parametrize("chunk", [1, 4, 32])
def test_every_loss_is_the_error_of_its_set(channels, size, multiple, chunk):
    weight, (blocks, second) = weights(channels), cut(moments(channels), size)
    losses, rank = channel_losses(weight, blocks, multiple, chunk=chunk)
    assert sorted(rank.tolist()) == list(range(channels))
    scale = np.trace(weight @ second @ weight.T)
    expected = [refit_error(weight, second, rank < width) for width in widths(channels, multiple)]
    assert losses == pytest.approx(expected, rel=1e-7, abs=1e-9 * scale)
    assert losses[-1] == 0
    assert (np.diff(losses) <= 0).all()


@pytest.mark.parametrize("size", [7, 4])
@pytest.mark.parametrize("seed", range(4))
def test_one_at_a_time_is_greedy(size, seed):
    weight, (blocks, second) = weights(7, 5, seed), cut(moments(7, seed), size)
    _, rank = channel_losses(weight, blocks, 1, chunk=1)
    kept = np.ones(7, dtype=bool)
    for place in range(6, 0, -1):
        errors = {}
        for channel in np.flatnonzero(kept):
            rest = kept.copy()
            rest[channel] = False
            errors[channel] = refit_error(weight, second, rest)
        least = min(errors, key=errors.__getitem__)
        assert rank[least] == place
        kept[least] = False


@pytest.mark.parametrize("chunk", [1, 3])
def test_greedy_is_not_far_from_the_best_of_all_sets(chunk):
    ratios = []
    for seed in range(4):
        weight, second = weights(8, 5, seed), moments(8, seed)
        losses, _ = channel_losses(weight, second[None], 1, chunk=chunk)
        for width in range(1, 8):
            sets = itertools.combinations(range(8), width)
            best = min(refit_error(weight, second, list(kept)) for kept in sets)
            ratios.append(losses[width - 1] / best)
    assert min(ratios) > 1 - 1e-8
    assert np.mean(ratios) < 1.02
    assert max(ratios) < 1.2


def test_several_at_a_time_lose_what_one_at_a_time_does():
    """Also where half of the channels nearly repeat the others, which must not go together."""
    random = np.random.default_rng(3)
    half = np.linalg.cholesky(moments(60) + 1e-9 * np.eye(60)) @ random.standard_normal((60, 900))
    copies = half * random.uniform(0.5, 1.5, (60, 1))
    copies += 0.1 * half.std(axis=1, keepdims=True) * random.standard_normal(half.shape)
    inputs = np.concatenate([half, copies])[random.permutation(120)]
    weight, blocks = weights(120), (inputs @ inputs.T / 900)[None]
    greedy, _ = channel_losses(weight, blocks, 12, chunk=1)
    for chunk in (8, 16):
        losses, _ = channel_losses(weight, blocks, 12, chunk=chunk)
        assert (losses[4:-1] / greedy[4:-1] < 1.01).all()


def test_blocks_compete():
    """Channels of a block that matters little go first, all of them."""
    second = moments(16, seed=2)
    weight = weights(16)
    weight[:, 8:] *= 1e-3
    _, rank = channel_losses(weight, cut(second, 8)[0], 4)
    assert sorted(rank[8:].tolist()) == list(range(8, 16))


def test_units_of_the_input_and_the_output():
    weight, blocks = weights(20), cut(moments(20), 8)[0]
    losses, rank = channel_losses(weight, blocks, 4)
    scaled, same = channel_losses(3 * weight, 5 * blocks, 4)
    np.testing.assert_allclose(scaled, 45 * losses, rtol=1e-9)
    np.testing.assert_array_equal(same, rank)


def test_stored_in_single_precision_with_fewer_directions_than_channels():
    second = moments(30, samples=5)
    weight = weights(30).astype(np.float32)
    losses, rank = channel_losses(weight, second[None].astype(np.float32), 10)
    expected = [refit_error(weight.astype(float), second, rank < width) for width in (10, 20, 30)]
    assert losses == pytest.approx(expected, rel=1e-3)


def test_a_layer_that_reads_zeros_loses_nothing():
    losses, rank = channel_losses(weights(10), np.zeros((2, 5, 5)), 5)
    assert losses.max() < 1e-12
    assert sorted(rank.tolist()) == list(range(10))


def test_the_inputs_stay_as_they_are():
    weight, blocks = weights(12), cut(moments(12), 5)[0]
    before = weight.copy(), blocks.copy()
    channel_losses(weight, blocks, 4)
    np.testing.assert_array_equal(weight, before[0])
    np.testing.assert_array_equal(blocks, before[1])

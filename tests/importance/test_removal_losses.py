"""`obs` against its definition: remove heads, re-fit the rest by least squares, measure the error.

The ridge r = 0.01 mean(diag C) makes C + rI the moments throughout, of the fit and of the error, as
if the inputs carried white noise of that variance.
"""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest

from spp_export.importance import CRITERIA

removal_losses = CRITERIA["obs"].heads
single_removal_losses = partial(removal_losses, ragged=True)

RIDGE = 0.01
# Greedy against exhaustive; the worst of the seeds below is 1.35.
GREEDY_FACTOR = 1.5


def layer(groups, size, *, dim=3, width=8, seed=0, samples=200):
    """Weights [d,m] and second moments [m,m] of correlated inputs with a mean."""
    random = np.random.default_rng(seed)
    m = groups * size * dim
    inputs = random.standard_normal((samples, m)) @ random.standard_normal((m, m))
    inputs = inputs * random.uniform(0.2, 3.0, m) + random.standard_normal(m)
    return random.standard_normal((width, m)), inputs.T @ inputs / samples


def free(groups, size):
    return np.zeros((groups, size), dtype=bool)


def refit_error(weight, second, kept):
    """E ||W a - W' a_S||^2 of the best W', all by the definition."""
    m = len(second)
    noisy = second + RIDGE * np.mean(np.diag(second)) * np.eye(m)
    columns = np.repeat(kept.reshape(-1), m // kept.size)
    normal, right = noisy[np.ix_(columns, columns)], noisy[columns] @ weight.T
    difference = weight.copy()
    difference[:, columns] -= np.linalg.solve(normal, right).T
    return np.trace(difference @ noisy @ difference.T)


def regular_sets(groups, size, a, b):
    """Every choice of a groups and b heads in each."""
    for chosen in itertools.combinations(range(groups), a):
        for heads in itertools.product(itertools.combinations(range(size), b), repeat=a):
            kept = free(groups, size)
            for group, inside in zip(chosen, heads, strict=True):
                kept[group, list(inside)] = True
            yield kept


def all_sets(groups, size):
    """Every choice of heads but the empty one, by (groups, heads)."""
    found = {}
    for bits in itertools.product([False, True], repeat=groups * size):
        kept = np.array(bits).reshape(groups, size)
        if kept.any():
            found.setdefault((int(kept.any(axis=1).sum()), int(kept.sum())), []).append(kept)
    return found


SIZES = [(1, 1), (1, 5), (4, 1), (2, 3), (3, 2), (3, 3), (4, 2)]


@pytest.mark.parametrize(("groups", "size"), SIZES)
@pytest.mark.parametrize("seed", range(4))
def test_every_loss_is_the_error_of_its_set(groups, size, seed):
    weight, second = layer(groups, size, seed=seed)
    losses, kept = removal_losses(weight, second, free(groups, size))
    assert losses.shape == (groups, size)
    assert kept.shape == (groups, size, groups, size)
    scale = np.trace(weight @ second @ weight.T)
    for a, b in np.ndindex(groups, size):
        counts = kept[a, b].sum(axis=1)
        assert sorted(counts.tolist()) == [0] * (groups - a - 1) + [b + 1] * (a + 1)
        expected = refit_error(weight, second, kept[a, b])
        assert losses[a, b] == pytest.approx(expected, rel=1e-6, abs=1e-9 * scale)
    assert losses[-1, -1] == 0
    assert kept[-1, -1].all()


def test_greedy_is_mostly_the_best_of_all_sets_and_never_far():
    """On small random layers, whose inputs are far more entangled than a model's heads."""
    ratios = []
    for (groups, size), seed in itertools.product([(2, 3), (3, 2), (4, 2), (2, 4)], range(6)):
        weight, second = layer(groups, size, seed=seed)
        losses, _ = removal_losses(weight, second, free(groups, size))
        for a, b in np.ndindex(groups, size):
            if (a + 1, b + 1) != (groups, size):
                sets = regular_sets(groups, size, a + 1, b + 1)
                best = min(refit_error(weight, second, kept) for kept in sets)
                ratios.append(losses[a, b] / best)
    assert min(ratios) > 1 - 1e-8
    assert np.mean(np.array(ratios) < 1 + 1e-8) > 0.9
    assert np.mean(ratios) < 1.02
    assert max(ratios) < GREEDY_FACTOR


@pytest.mark.parametrize(("groups", "size", "a", "b"), [(1, 6, 1, 5), (5, 1, 4, 1), (4, 2, 3, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_a_single_removal_is_the_best_one(groups, size, a, b, seed):
    """One head of a group that is alone, or one whole group."""
    weight, second = layer(groups, size, seed=seed)
    losses, _ = removal_losses(weight, second, free(groups, size))
    sets = regular_sets(groups, size, a, b)
    best = min(refit_error(weight, second, kept) for kept in sets)
    assert losses[a - 1, b - 1] == pytest.approx(best, rel=1e-8)


@pytest.mark.parametrize("seed", range(4))
def test_keeping_less_never_costs_less(seed):
    losses, _ = removal_losses(*layer(4, 3, seed=seed), free(4, 3))
    assert (losses >= 0).all()
    # whole groups from the dense layer, and heads from all groups: nested sets, hence exact
    assert (np.diff(losses[:, -1]) <= 0).all()
    assert (np.diff(losses[-1]) <= 0).all()


def test_units_of_the_input_and_the_output():
    weight, second = layer(3, 2)
    losses, kept = removal_losses(weight, second, free(3, 2))
    scaled, same = removal_losses(3 * weight, 5 * second, free(3, 2))
    np.testing.assert_allclose(scaled, 45 * losses, rtol=1e-9)
    np.testing.assert_array_equal(same, kept)


def test_the_order_of_the_groups_does_not_matter():
    weight, second = layer(3, 2, seed=5)
    order = np.array([2, 0, 1])
    columns = np.arange(len(second)).reshape(3, -1)[order].reshape(-1)
    losses, kept = removal_losses(weight, second, free(3, 2))
    moved, of = removal_losses(weight[:, columns], second[np.ix_(columns, columns)], free(3, 2))
    np.testing.assert_allclose(moved, losses, rtol=1e-9)
    np.testing.assert_array_equal(of, kept[:, :, order])


@pytest.mark.parametrize("seed", range(40))
def test_forced_heads_stay_or_the_size_is_impossible(seed):
    random = np.random.default_rng(seed)
    groups, size = random.integers(1, 5), random.integers(1, 4)
    forced = random.random((groups, size)) < 0.3
    weight, second = layer(groups, size, dim=2, width=4, seed=seed)
    losses, kept = removal_losses(weight, second, forced)
    for a, b in np.ndindex(*losses.shape):
        fits = forced.any(axis=1).sum() <= a + 1 and forced.sum(axis=1).max() <= b + 1
        assert np.isfinite(losses[a, b]) == fits
        assert not (forced & ~kept[a, b]).any() or not fits
        if fits:
            expected = refit_error(weight, second, kept[a, b])
            assert losses[a, b] == pytest.approx(expected, rel=1e-6, abs=1e-7)
        else:
            assert losses[a, b] == np.inf


def test_forcing_the_head_that_goes_first_costs():
    weight, second = layer(1, 5, seed=2)
    losses, kept = removal_losses(weight, second, free(1, 5))
    held, others = removal_losses(weight, second, ~kept[0, 3])
    assert held[0, 3] > losses[0, 3]
    assert others[0, 3][~kept[0, 3]].all()


def test_a_copy_of_another_head_costs_next_to_nothing():
    """What a score per head cannot see: two heads that say the same need only one."""
    random = np.random.default_rng(0)
    inputs = random.standard_normal((500, 12))
    inputs[:, 9:] = inputs[:, :3]  # head 3 repeats head 0
    weight = random.standard_normal((8, 12))
    losses, kept = removal_losses(weight, inputs.T @ inputs / 500, free(4, 1))
    energy = np.trace(weight @ weight.T)
    assert losses[2, 0] < 0.02 * energy
    assert losses[1, 0] > 0.1 * energy
    assert kept[2, 0, [0, 3], 0].sum() == 1


def test_fewer_directions_than_inputs_stay_finite():
    weight, second = layer(3, 2, samples=2)
    losses, kept = removal_losses(weight.astype(np.float32), second.astype(np.float32), free(3, 2))
    assert np.isfinite(losses).all()
    assert losses[0, 0] == pytest.approx(refit_error(weight, second, kept[0, 0]), rel=1e-3)


def test_a_layer_that_reads_zeros_loses_nothing():
    weight, second = layer(3, 2)
    losses, kept = removal_losses(weight, 0 * second, free(3, 2))
    energy = np.trace(weight @ second @ weight.T)
    assert losses.max() < 1e-12 * energy
    assert kept[0, 0].sum() == 1


def test_the_inputs_stay_as_they_are():
    weight, second = layer(2, 2)
    before = weight.copy(), second.copy()
    removal_losses(weight, second, free(2, 2))
    np.testing.assert_array_equal(weight, before[0])
    np.testing.assert_array_equal(second, before[1])


@pytest.mark.parametrize(("groups", "size"), SIZES)
@pytest.mark.parametrize("seed", range(3))
def test_single_heads_every_loss_is_the_error_of_its_set(groups, size, seed):
    weight, second = layer(groups, size, seed=seed)
    losses, kept = single_removal_losses(weight, second, free(groups, size))
    assert losses.shape == (groups, groups * size)
    scale = np.trace(weight @ second @ weight.T)
    possible = all_sets(groups, size)
    for a, q in np.ndindex(*losses.shape):
        assert np.isfinite(losses[a, q]) == ((a + 1, q + 1) in possible)
        if np.isfinite(losses[a, q]):
            assert (kept[a, q].any(axis=1).sum(), kept[a, q].sum()) == (a + 1, q + 1)
            expected = refit_error(weight, second, kept[a, q])
            assert losses[a, q] == pytest.approx(expected, rel=1e-6, abs=1e-9 * scale)
    assert losses[-1, -1] == 0


def test_single_heads_greedy_is_mostly_the_best_of_all_sets_and_never_far():
    ratios = []
    for (groups, size), seed in itertools.product([(2, 3), (3, 2), (4, 2), (2, 4)], range(4)):
        weight, second = layer(groups, size, seed=seed)
        losses, _ = single_removal_losses(weight, second, free(groups, size))
        for (a, q), sets in all_sets(groups, size).items():
            if q < groups * size:
                best = min(refit_error(weight, second, kept) for kept in sets)
                ratios.append(losses[a - 1, q - 1] / best)
    assert min(ratios) > 1 - 1e-8
    assert np.mean(np.array(ratios) < 1 + 1e-8) > 0.8
    assert np.mean(ratios) < 1.03
    assert max(ratios) < GREEDY_FACTOR


@pytest.mark.parametrize("seed", range(4))
def test_single_heads_no_regular_size_loses_more(seed):
    weight, second = layer(3, 3, seed=seed)
    regular, _ = removal_losses(weight, second, free(3, 3))
    losses, _ = single_removal_losses(weight, second, free(3, 3))
    for a, b in np.ndindex(*regular.shape):
        assert losses[a, (a + 1) * (b + 1) - 1] <= regular[a, b]


@pytest.mark.parametrize("seed", range(4))
def test_single_heads_the_first_to_go_is_the_best_one(seed):
    weight, second = layer(2, 4, seed=seed)
    losses, _ = single_removal_losses(weight, second, free(2, 4))
    best = min(refit_error(weight, second, kept) for kept in all_sets(2, 4)[2, 7])
    assert losses[1, 6] == pytest.approx(best, rel=1e-8)


@pytest.mark.parametrize("seed", range(20))
def test_single_heads_forced_heads_stay(seed):
    random = np.random.default_rng(seed)
    groups, size = random.integers(1, 5), random.integers(1, 4)
    forced = random.random((groups, size)) < 0.3
    weight, second = layer(groups, size, dim=2, width=4, seed=seed)
    losses, kept = single_removal_losses(weight, second, forced)
    assert np.isfinite(losses[-1, -1])
    for a, q in np.argwhere(np.isfinite(losses)):
        assert not (forced & ~kept[a, q]).any()
    possible = all_sets(groups, size)
    for a, q in np.ndindex(*losses.shape):
        holds = (not (forced & ~kept).any() for kept in possible.get((a + 1, q + 1), ()))
        assert np.isfinite(losses[a, q]) == any(holds)

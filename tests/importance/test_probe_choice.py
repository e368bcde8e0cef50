"""Which tokens are probed: by the published rule, and never padding."""

from __future__ import annotations

import math

import pytest
import torch

from spp_export.importance.probe_pruning.probe import PositionMoments, choose, whole


def norms_of(table):
    """A residual stream whose tokens have these norms, in random directions."""
    norms = torch.as_tensor(table, dtype=torch.float64)
    directions = torch.randn(*norms.shape, 8, generator=torch.Generator().manual_seed(0)).double()
    return norms[..., None] * directions / directions.norm(dim=-1, keepdim=True)


def random_case(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    norms = torch.rand(len(lengths), max(lengths), generator=generator).double() + 0.1
    real = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return norms, real


@pytest.mark.parametrize("lengths", [[30], [3], [40, 17, 25], [64] * 25, [5, 7, 12] * 14])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_positions_come_first_then_samples(lengths, seed):
    norms, real = random_case(lengths, seed)
    probe = choose(norms_of(norms), real)
    table = [
        [norms[b, s].item() if real[b, s] else 0.0 for s in range(norms.shape[1])]
        for b in range(len(lengths))
    ]
    length = max(lengths)
    strength = [math.hypot(*(row[s] for row in table)) for s in range(length)]
    count = max(math.ceil(length / 2), 2)
    positions = sorted(sorted(range(length), key=lambda s: -strength[s])[:count])
    if count <= 10:
        positions[0] = 0
    samples = sorted(
        sorted(range(len(lengths)), key=lambda b: -math.hypot(*(table[b][s] for s in positions)))[
            : math.ceil(len(lengths) / 20)
        ]
    )
    assert probe.positions.tolist() == positions
    assert probe.samples.tolist() == samples
    assert probe.real.tolist() == [[bool(real[b, s]) for s in positions] for b in samples]


@pytest.mark.parametrize(("size", "kept"), [(1, 1), (20, 1), (21, 2), (140, 7)])
def test_one_sample_in_twenty(size, kept):
    norms, real = random_case([6] * size)
    assert len(choose(norms_of(norms), real).samples) == kept


@pytest.mark.parametrize(("length", "kept"), [(1, 1), (2, 2), (3, 2), (21, 11)])
def test_half_of_the_positions_and_at_least_two(length, kept):
    norms, real = random_case([length])
    assert len(choose(norms_of(norms), real).positions) == kept


def test_a_short_probe_starts_at_the_first_token_and_a_long_one_need_not():
    rising = norms_of(torch.arange(1.0, 21.0)[None])
    assert choose(rising, torch.ones(1, 20, dtype=torch.bool)).positions.tolist() == [
        0,
        *range(11, 20),
    ]
    rising = norms_of(torch.arange(1.0, 23.0)[None])
    assert choose(rising, torch.ones(1, 22, dtype=torch.bool)).positions.tolist() == [
        *range(11, 22)
    ]


@pytest.mark.parametrize("poison", [1e30, math.inf, math.nan])
def test_pads_are_never_chosen_over_real_tokens(poison):
    norms, real = random_case([9, 4, 12])
    wide, tail = torch.nn.functional.pad(real, (0, 20, 0, 30)), 20
    residual = norms_of(torch.nn.functional.pad(norms, (0, tail, 0, 30)))
    residual[~wide] = poison
    expected = choose(norms_of(norms), real)
    found = choose(residual, wide)
    assert found.positions.tolist() == expected.positions.tolist()
    assert found.samples.tolist() == expected.samples.tolist()
    assert real.any(0)[found.positions].all()


def test_real_tokens_without_any_norm_still_rank_above_pads():
    real = torch.tensor([[0, 0, 0, 0], [1, 1, 0, 0]]).bool()
    probe = choose(torch.zeros(2, 4, 8), real)
    assert probe.positions.tolist() == [0, 1]
    assert probe.samples.tolist() == [1]
    assert probe.real.all()


def test_positions_beyond_the_history_are_closed():
    rising = norms_of(torch.arange(1.0, 101.0)[None])
    probe = choose(rising, torch.ones(1, 100, dtype=torch.bool), longest=40)
    assert probe.positions.tolist() == [*range(20, 40)]


def test_moments_are_means_over_samples_that_have_the_position():
    values = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    real = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    values[~real] = math.inf
    moments = PositionMoments(7)
    moments.add(values, whole(real))
    moments.add(values[:1, :2], whole(real[:1, :2]))
    assert moments.counts.tolist() == [4, 3, 1, 1, 0, 0, 0]
    first = (2 * values[0, 0] ** 2 + values[1, 0] ** 2 + values[2, 0] ** 2) / 4
    torch.testing.assert_close(moments.values[0], first)
    torch.testing.assert_close(moments.values[3], values[0, 3] ** 2)
    assert not moments.values[4:].any()


def test_half_precision_squares_do_not_overflow():
    moments = PositionMoments(1)
    moments.add(torch.full((1, 1, 2), 6e4, dtype=torch.float16), whole(torch.ones(1, 1).bool()))
    assert torch.isfinite(moments.values).all()

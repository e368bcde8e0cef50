"""The greedy choice of domains, against an objective computed text by text."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from spp_export.common.errors import UsageError
from spp_export.domains.axes import domain_space
from spp_export.domains.selection import select_domains


def space(candidates=5, per=6, seed=0):
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(candidates), per)
    centres = 2 * random.standard_normal((candidates, 6))
    return domain_space(
        centres[labels] + random.standard_normal((len(labels), 6)), labels, candidates
    )


def objective(space, members, weight):
    """Coverage and separation of a set, one text and one pair at a time."""
    centre = space.centres.mean(axis=0)
    coverage = []
    for k in range(len(space.centres)):
        served = []
        for text in space.texts[space.labels == k]:
            offset = text - centre
            cosines = [offset @ space.axes[m] / np.linalg.norm(offset) for m in members]
            served.append(max(0.0, *cosines))
        coverage.append(np.mean(served))
    pairs = [abs(space.axes[i] @ space.axes[j]) for i, j in itertools.combinations(members, 2)]
    separation = 1 - np.mean(pairs) if pairs else 1.0
    return np.mean(coverage), separation, weight * np.mean(coverage) + (1 - weight) * separation


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_each_step_takes_what_adds_most(weight):
    at = space()
    steps = select_domains(at, 4, weight)
    members, before = [], 0.0
    for step in steps:
        options = {c: objective(at, [*members, c], weight)[2] for c in range(5) if c not in members}
        assert options[step.candidate] == pytest.approx(max(options.values()))
        members.append(step.candidate)
        coverage, separation, after = objective(at, members, weight)
        assert (step.coverage, step.separation) == pytest.approx((coverage, separation))
        assert step.gain == pytest.approx(after - before)
        before = after


def test_coverage_alone_reaches_its_share_of_the_best_set():
    """Greedy choice of a submodular function: at least 1 - 1/e of the optimum."""
    at = space(candidates=7, seed=3)
    found = select_domains(at, 3, 1.0)[-1].coverage
    best = max(objective(at, c, 1.0)[0] for c in itertools.combinations(range(7), 3))
    assert (1 - np.exp(-1)) * best <= found <= best + 1e-12


def test_all_candidates_can_be_taken_and_the_first_wins_among_equals():
    assert sorted(step.candidate for step in select_domains(space(), 5)) == [0, 1, 2, 3, 4]
    assert select_domains(space(), 1, 0.0)[0].candidate == 0


@pytest.mark.parametrize("count", [0, 6, -1])
def test_a_number_that_cannot_be_taken(count):
    with pytest.raises(UsageError, match="from 1 to 5"):
        select_domains(space(), count)

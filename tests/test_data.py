"""The texts that ship with the project: enough of them, varied, and nothing measured on that was
calibrated on."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from spp_export.data.pools import read_pools
from spp_export.data.scenario import read_scenario

DATA = Path(__file__).resolve().parents[1] / "benchmarks" / "data"
DEFAULT = ("chemistry", "finance", "history", "math", "philosophy", "technology")
DOMAINS = sorted(path.name for path in (DATA / "pools").iterdir())
SCENARIOS = sorted((DATA / "scenarios").iterdir())
SHARED_WORDS = 8


def runs(text: str) -> set[tuple[str, ...]]:
    """Every run of SHARED_WORDS words of a text."""
    words = text.lower().split()
    return {tuple(words[i : i + SHARED_WORDS]) for i in range(len(words) - SHARED_WORDS + 1)}


def test_all_default_domains_are_there() -> None:
    assert set(DEFAULT) <= set(DOMAINS)
    assert len(DOMAINS) >= 12


@pytest.mark.parametrize("domain", DOMAINS)
def test_pools_are_large_and_apart(domain: str) -> None:
    pools = read_pools(DATA / "pools", [domain])
    train, val = pools.train[0], pools.val[0]
    assert len(train) >= 120
    assert len(val) >= 40
    seen = set().union(*map(runs, train))
    assert not [text for text in val if runs(text) & seen]
    # varied in form: no opening word starts more than a sixth of the prompts
    openings = [text.split()[0] for text in train]
    assert max(map(openings.count, openings)) <= len(train) / 6


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_scenarios_share_nothing_with_the_pools(path: Path) -> None:
    scenario = read_scenario(path)
    assert len(scenario.prompts) >= 28
    own = set().union(*map(runs, scenario.prompts))
    for domain in DOMAINS:
        pools = read_pools(DATA / "pools", [domain])
        for text in (*pools.train[0], *pools.val[0]):
            assert not runs(text) & own


def test_scenarios_are_all_different() -> None:
    prompts = [set(read_scenario(path).prompts) for path in SCENARIOS]
    assert not any(a & b for a, b in pairwise(prompts))

"""Damaged files end in success or in one line: a seeded thousand here, and many more if slow."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_campaign import campaign, table
from fuzz_targets import TARGETS

CAMPAIGN = Path(__file__).with_name("fuzz_campaign.py")
SHORT, LONG = 1_000, 25_000


def test_a_seeded_thousand():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tallies = campaign(SHORT)
    print(table(tallies))
    assert [str(finding) for tally in tallies for finding in tally.findings] == []
    assert sum(tally.inputs for tally in tallies) >= SHORT
    # Damage that every reader sees through at once, or that none sees, tests nothing.
    for tally in tallies:
        assert tally.outcomes["success"] > 0, tally.target
        assert len(tally.outcomes) > 1 or tally.target in {"manifest", "show"}, tally.target
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 << 10


def test_an_input_can_be_made_again():
    first, second = (campaign(1, names=["plan"], only=17) for _ in range(2))
    assert first[0].outcomes == second[0].outcomes


@pytest.mark.slow
def test_many_thousands(capfd):
    """In a process of its own, whose memory is limited; its counts are printed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, map(str, sys.path)))}
    result = subprocess.run(
        [sys.executable, CAMPAIGN, "--inputs", str(LONG), "--seed", "1"],
        env=environment,
        capture_output=True,
        text=True,
    )
    with capfd.disabled():
        print(f"\n{result.stdout}", end="")
    assert result.returncode == 0, result.stdout + result.stderr
    assert all(name in result.stdout for name in TARGETS)

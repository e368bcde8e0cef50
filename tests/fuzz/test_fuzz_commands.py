"""Commands on damaged files end with a status and a line, and leave nothing behind."""

from __future__ import annotations

import pytest
from fuzz_campaign import table
from fuzz_commands import ATTACKS, attacks, make_workplace


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPP_CACHE", str(tmp_path_factory.mktemp("cache")))
        root = tmp_path_factory.mktemp("workplace")
        make_workplace(root)
        yield root


def _judge(tallies):
    print(table(tallies))
    assert [str(finding) for tally in tallies for finding in tally.findings] == []


def test_some_of_every_command(workplace):
    _judge(attacks(workplace, 5))


@pytest.mark.slow
def test_many_of_every_command(workplace, capfd):
    tallies = attacks(workplace, 100)
    with capfd.disabled():
        print(f"\n{table(tallies)}")
    _judge(tallies)
    for attack, tally in zip(ATTACKS, tallies, strict=True):
        # Where nothing is sealed anew, `verify` has to see every change.
        assert tally.outcomes["exit 0"] > 0 or attack.name == "verify", tally.target
    assert sum(tally.inputs for tally in tallies) == 100 * len(ATTACKS)

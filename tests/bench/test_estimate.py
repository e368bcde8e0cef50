"""The estimate for a large model, and the page that shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from spp_campaigns.estimate import (
    _RATES,
    LLAMA_405B,
    Hardware,
    Way,
    command_seconds,
    export_work,
    main,
    pass_operations,
    probe_work,
    sums_bytes,
)

PAGE = Path(__file__).parents[2] / "docs" / "many-machines.md"
ON = Hardware(**{name: default for name, _, default, _ in _RATES})


def test_the_page_shows_what_the_command_prints(capsys):
    main([])
    assert capsys.readouterr().out.strip() in PAGE.read_text(encoding="utf-8")


def test_sizes_are_those_of_the_config():
    shape = LLAMA_405B.shape
    layer = 16384 * (2 * 16384 + 2 * 1024 + 3 * 53248) + 2 * 16384
    assert shape.parameters(shape.layers) == 126 * layer + 2 * 128256 * 16384 + 16384
    assert sums_bytes(shape, ["attention"]) == 126 * 4 * 16384**2
    assert pass_operations(shape, 2) == pytest.approx(2 * pass_operations(shape, 1))


@pytest.mark.parametrize("work", [probe_work(6), export_work(6)])
def test_more_machines_take_less_time_and_the_network(work):
    one, eight = (
        command_seconds(LLAMA_405B.shape, work, Way("map", count, 1), ON) for count in (1, 8)
    )
    assert one["passes"] == pytest.approx(8 * eight["passes"])
    assert one["moments"] == pytest.approx(8 * eight["moments"])
    assert one["weights from disk"] == eight["weights from disk"]
    assert not one["sums over the network"]
    assert eight["sums over the network"] > 0

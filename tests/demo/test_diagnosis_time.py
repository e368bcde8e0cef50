"""Timing from a text to a plan, on the default model."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.demo


def test_a_plan_is_made_from_a_text_as_often_as_asked(tmp_path):
    from spp_bench.plan_time import from_text

    scenario = tmp_path / "s.txt"
    scenario.write_text("What is an acid?\n\nWhat is a base?\n\nWhat is a salt?\n\nWhat is pH?\n")
    found = from_text(0.7, 2, scenario)
    assert len(found.seconds) == 2
    assert 0 < found.prompts < 4
    assert all(seconds > 0 for seconds in found.seconds)

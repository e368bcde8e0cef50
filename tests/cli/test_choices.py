"""Requests type choices out again whose modules are slow to load: help comes before them."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from spp_cli.main import run
from spp_export.common.options import DtypeName, field_types
from spp_export.importance.comparable import COMPARABLE
from spp_export.models.session import _DTYPES
from spp_export.models.shape import LAYOUTS, UNITS
from spp_export.planning.budget import COSTS
from spp_export.planning.plan import COMPENSATIONS
from spp_export.planning.request import Comparable, PlanRequest

TYPES = field_types(PlanRequest)


@pytest.mark.parametrize(
    ("choices", "known"),
    [
        (Comparable, COMPARABLE),
        (DtypeName, _DTYPES),
        (TYPES["units"], UNITS),
        (TYPES["layout"], LAYOUTS),
        (TYPES["compensate"], COMPENSATIONS),
        (TYPES["cost"], COSTS),
    ],
    ids=["comparable", "dtype", "units", "layout", "compensate", "cost"],
)
def test_the_choices_are_the_librarys(choices: Any, known: tuple[str, ...]) -> None:
    assert sorted(get_args(choices)) == sorted(known)


NUMBERS = {
    "plan": {
        "--keep": ("60%", "0,6", "60", "0", "nan", "1.01"),
        "--strength": ("60%", "0,6", "2", "inf"),
        "--shrinkage": ("5%", "-0.1"),
        "--max-latency": ("1ms", "0", "1,5"),
        "--tp": ("two", "0", "1.5"),
    },
    "export": {"--max-perplexity": ("5%", "0", "1,1"), "--max-params": ("0",)},
    "recover": {
        "--steps": ("1e3", "-1"),
        "--layer-rounds": ("all", "-1"),
        "--rank": ("0",),
        "--learning-rate": ("1%", "0", "5e-4."),
    },
    "chat": {"--temperature": ("0,7", "-1"), "--top-p": ("90", "90%"), "--top-k": ("all", "0")},
    "eval": {"--keep": ("0.9,0.8", "90", "0")},
    "bench": {"--batch": ("1,2", "0"), "--keep": ("75%",), "--context": ("1k",)},
}
EXPECTED = {
    "--keep": "a share between 0 and 1, such as 0.8",
    "--top-p": "a share between 0 and 1, such as 0.8",
    "--strength": "a number from 0 to 1, such as 0.5",
    "--shrinkage": "a number from 0 to 1, such as 0.5",
    "--max-latency": "milliseconds above 0, such as 12.5",
    "--max-perplexity": "a ratio above 0, such as 1.05",
    "--learning-rate": "a number between 0 and 1, such as 0.0005",
    "--temperature": "a number of 0 or more, such as 0.7",
    "--steps": "a whole number of 0 or more",
    "--layer-rounds": "a whole number of 0 or more",
}


@pytest.mark.parametrize(
    ("command", "flag", "word"),
    [(c, flag, word) for c, flags in NUMBERS.items() for flag in flags for word in flags[flag]],
)
def test_a_number_that_is_none_is_told_what_one_is(
    capsys: pytest.CaptureFixture[str], command: str, flag: str, word: str
) -> None:
    needed = {
        "plan": ["--scenario", "s.txt"],
        "export": ["--scenario", "s.txt"],
        "recover": ["out", "--data", "d.txt"],
        "chat": ["out"],
        "eval": ["--scenario", "s.txt", "-o", "results"],
        "bench": ["out"],
    }[command]
    extra = ["--temperature", "1"] if flag.startswith("--top") else []
    assert run([command, *needed, *extra, f"{flag}={word}"]) == 2
    expected = EXPECTED.get(flag, "a whole number of 1 or more")
    assert capsys.readouterr().err == f"error: {flag} {word}: expected {expected}.\n"

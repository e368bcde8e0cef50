"""Which rows a standard evaluation has, what they are called, and their keys."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import fields, replace

import pytest

from spp_export.evaluation.harness.rows import DENSE, Row, row_key, standard_rows

ROW = Row(0.8, "heads", "obs")


def test_controls_are_there_whatever_is_asked():
    rows = standard_rows([0.9, 0.8], ["energy"], ["heads", "both"], ["none", "lstsq"])
    assert rows[0] == DENSE
    budgets = Counter((r.keep, r.units, r.compensation) for r in rows[1:])
    assert len(budgets) == 8
    for keep, units, compensation in budgets:
        labels = [
            row.label
            for row in rows
            if (row.keep, row.units, row.compensation) == (keep, units, compensation)
        ]
        assert labels == [
            "energy",
            "random, seed 0",
            "random, seed 1",
            "random, seed 2",
            "whitelist only",
            "energy, domain mean",
            "energy, wrong scenario",
        ]


def test_no_wrong_control_without_a_wrong_scenario():
    rows = standard_rows([0.8], ["energy"], wrong=False)
    assert "wrong" not in {row.text for row in rows}


def test_random_as_a_criterion_is_the_control():
    rows = standard_rows([0.8], ["energy", "random"])
    assert len(rows) == len(set(rows))
    assert {row.kind for row in rows if row.criterion == "random"} == {"control"}
    assert sum(row.criterion == "random" for row in rows) == 4


def test_dynamic_criteria_are_never_compensated():
    rows = standard_rows([0.8], ["probe-pruning", "energy"], compensations=["none", "lstsq"])
    dynamic = [row for row in rows if row.kind == "dynamic"]
    assert [(row.criterion, row.compensation) for row in dynamic] == [("probe-pruning", "none")]
    assert {row.criterion for row in rows if row.text == "mean"} == {"energy"}


def test_ablations_take_one_thing_away():
    rows = standard_rows([0.8], ["obs", "flap"], ablations=True, other_artifacts=["plain"])
    labels = [row.label for row in rows if row.kind == "ablation"]
    assert labels == ["obs, no whitelist", "obs, single domain", "obs, artifacts plain"]


def test_a_comparable_of_its_own_is_in_the_label():
    assert replace(ROW, comparable="raw").label == "obs, raw"


@pytest.mark.parametrize("name", [field.name for field in fields(Row)])
def test_every_field_is_in_the_key(name):
    other = {"keep": 0.7, "whitelist": False, "seed": 1}.get(name, "else")
    assert row_key(replace(ROW, **{name: other}), "c") != row_key(ROW, "c")


def test_keys_are_the_same_in_every_process():
    code = (
        "from spp_export.evaluation.harness.rows import Row, row_key;"
        "print(row_key(Row(0.8, 'heads', 'obs'), 'context'))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == row_key(ROW, "context")
    assert row_key(ROW, "context") != row_key(ROW, "other")

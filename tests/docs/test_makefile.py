"""The evaluations of the Makefile, of the default model and of one that is given."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("eval", "eval-finance", "eval-traffic", "eval-answers", "eval-ablations")


def commands(*arguments: str, **environment: str) -> list[str]:
    """What `make` would run of ours, a line each."""
    found = subprocess.run(
        ["make", "--dry-run", "--always-make", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = found.stdout.replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if "bin/spp" in line or "campaigns" in line]


@pytest.mark.parametrize("target", TARGETS)
def test_a_model_of_ones_own_is_probed_and_has_a_folder_of_its_name(target):
    first, *others = commands(target, "MODEL=/models/small-qwen/")
    assert first.endswith("-o build/artifacts-small-qwen --force")
    assert "spp probe --model /models/small-qwen/ --pools" in first
    for line in others:
        if "spp eval" in line:
            assert "--model /models/small-qwen/ --artifacts build/artifacts-small-qwen " in line
        if "spp probe" in line:
            assert "--model /models/small-qwen/ " in line
        place = next(
            word for word in line.split() if word.startswith(("benchmarks/results", "build"))
        )
        assert "small-qwen" in place


@pytest.mark.parametrize("target", TARGETS)
def test_the_default_model_needs_neither(target):
    for line in commands(target, MODEL="elsewhere"):
        assert "--model" not in line
        assert "--artifacts " not in line


def test_a_scenario_of_ones_own_is_in_the_name_of_its_results():
    _, evaluated, shown = commands("eval-traffic", "MODEL=org/model", "SCENARIO=texts/mine.jsonl")
    assert "--scenario texts/mine.jsonl " in evaluated
    assert evaluated.endswith("-o benchmarks/results/model/eval-traffic-mine")
    assert shown.endswith("quality_tables benchmarks/results/model/eval-traffic-mine")


def test_help_names_every_evaluation():
    said = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(f"make {target} " in said.stdout for target in TARGETS)
    assert "MODEL=DIR" in said.stdout
    assert "SCENARIO=FILE" in said.stdout

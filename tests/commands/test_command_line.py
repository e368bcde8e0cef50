"""The commands on a real checkpoint, from pools to a verified export, by their exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from exporting import CASE

# All in one process, since each would import transformers again.
SESSION = """
import json, sys
from spp_cli.main import run

pools, dense, sister, scenario = sys.argv[1:]
model = ["--model", dense, "--quiet"]

def spp(*arguments):
    print(json.dumps([run([*arguments, *model]), arguments[0]]), flush=True)

spp("probe", "--pools", pools, "-o", "artifacts")
given = ["--scenario", scenario, "--artifacts", "artifacts"]
spp("diagnose", *given)
spp("plan", *given, "--keep", "0.7", "-o", "plan.json")
spp("export", *given, "--keep", "0.7", "-o", "a/slim")
spp("export", *given, "--plan", "plan.json", "-o", "b/slim")
spp("export", *given, "--keep", "0.7", "-o", "a/slim")
spp("export", *given, "--keep", "0.7", "-o", "gated", "--max-perplexity", "0.1")
spp("export", *given, "--keep", "0.0001", "-o", "never")
spp("verify", "a/slim", "--scenario", scenario)
model[1] = sister
spp("verify", "a/slim")
model[1] = dense
with open("a/slim/config.json", "a") as file:
    file.write(" ")
spp("verify", "a/slim", "--json")
spp("verify", "artifacts")
"""
EXPECTED = [
    ("probe", 0),
    ("diagnose", 0),
    ("plan", 0),
    ("export", 0),
    ("export", 0),  # of the plan
    ("export", 2),  # it is there
    ("export", 1),  # the gate
    ("export", 2),  # no such budget
    ("verify", 0),
    ("verify", 1),  # other weights of the same shapes
    ("verify", 1),  # a file has changed
    ("verify", 2),  # not an export
]


@pytest.fixture(scope="module")
def session(workshop, tmp_path_factory):
    """The working directory, the exit statuses, and what was said on stdout and stderr."""
    here = tmp_path_factory.mktemp("session")
    sister = CASE["llama-gqa-bias"].make(here / "sister", seed=1)
    dense = workshop.dense("llama-gqa-bias")
    arguments = [str(path) for path in (workshop.pools, dense, sister, workshop.scenario)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, map(str, sys.path)))}
    result = subprocess.run(
        [sys.executable, "-c", SESSION, *arguments],
        cwd=here,
        env={**environment, "SPP_CACHE": str(here / "cache")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return here, result.stdout, result.stderr


def test_statuses(session):
    _, stdout, _ = session
    lines = [json.loads(line) for line in stdout.splitlines() if line.startswith("[")]
    assert [(command, status) for status, command in lines] == EXPECTED


def test_every_refusal_is_one_line(session):
    _, _, stderr = session
    lines = stderr.splitlines()
    assert len(lines) == sum(status != 0 for _, status in EXPECTED)
    for line, expected in zip(
        lines,
        (
            "is not empty",
            "held-out perplexity is",
            "is below the smallest plan",
            "logits parity with the masked dense model",
            "config.json",
            "no plan.json",
        ),
        strict=True,
    ):
        assert line.startswith("error: ")
        assert expected in line


def test_nothing_is_left_but_what_was_asked_for(session):
    here, _, _ = session
    assert sorted(path.name for path in here.iterdir()) == [
        "a",
        "artifacts",
        "b",
        "cache",
        "plan.json",
        "sister",
    ]
    assert [path.name for path in (here / "a").iterdir()] == ["slim"]


def test_the_plan_command_decides_what_export_does(session):
    here, _, _ = session
    plan = (here / "plan.json").read_bytes()
    assert (here / "b" / "slim" / "plan.json").read_bytes() == plan
    for name in ("model.safetensors", "plan.json", "verify.json", "README.md"):
        one, other = (here / place / "slim" / name for place in ("a", "b"))
        assert one.read_bytes() == other.read_bytes(), name

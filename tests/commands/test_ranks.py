"""Commands on several ranks, as torchrun starts them: the answer of one, and what goes wrong."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from exporting import KEEP
from old_transformers import since_5
from ranks import Rank, Ranks
from safetensors.numpy import load_file

CASE = "llama-gqa-bias"
OBSERVE = ("spp_export.calibration.activations", "observe")


@pytest.fixture(scope="module")
def ranks():
    started = Ranks()
    yield started
    started.close()


@pytest.fixture
def ask(workshop, tmp_path, monkeypatch):
    """A command's arguments; what it reads off the model is not in the cache."""
    dense = ("--model", workshop.dense(CASE), "--artifacts", workshop.artifacts(CASE))
    monkeypatch.setenv("SPP_CACHE", str(tmp_path / "cache"))

    def arguments(name, *more):
        budget = () if name == "diagnose" else ("--keep", KEEP)
        return name, "--scenario", workshop.scenario, *dense, *budget, *more

    return arguments


def renewed(tmp_path):
    """The statistics in the cache, which is then empty again."""
    files = sorted((tmp_path / "cache" / "statistics").glob("*.safetensors"))
    found = {path.name: load_file(path) for path in files}
    shutil.rmtree(tmp_path / "cache")
    return found


def one_line(ended, status):
    """What rank 0 said, while the others were silent."""
    first, *others = ended
    assert not any(other.out or other.err for other in others)
    assert first.status == status
    (line,) = first.err.splitlines()
    return line


def nothing_left(tmp_path):
    """Neither an output nor a hidden place, here or in the cache."""
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return not [path for path in files if path.parent.name != "answers"]


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_plan_is_that_of_one_process(ranks, ask, tmp_path, size):
    asked = ask("plan", "--units", "both", "--answer-tokens", "4", "--json")
    (one,) = ranks.run(asked, 1)
    expected = renewed(tmp_path)
    first, *others = ranks.run(asked, size)
    assert not any(other.out or other.err or other.status for other in others)
    assert first.status == 0, first.err
    plan, wanted = (json.loads(rank.out)["plan"] for rank in (first, one))
    assert plan["layers"] == wanted["layers"]
    assert plan["diagnosis"] == wanted["diagnosis"]
    found = renewed(tmp_path)
    assert found.keys() == expected.keys()
    assert found
    for name, tensors in expected.items():
        for key, values in tensors.items():
            np.testing.assert_allclose(found[name][key], values, rtol=1e-5, atol=1e-6)


@since_5("its parts of a model do not mix with the tensors that statistics are made of")
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_model_in_parts(ranks, ask, tmp_path, size):
    # Sums of parts are rounded otherwise, in bfloat16 too far to be compared number by number.
    exact = ("--matmul", "float32")
    asked = ask("plan", "--units", "both", "--answer-tokens", "4", *exact, "--json")
    (one,) = ranks.run(asked, 1)
    expected = renewed(tmp_path)
    first, *others = ranks.run([*asked, "--parallel", "tensor"], size)
    assert first.status == 0, first.err
    assert not any(other.out or other.err or other.status for other in others)
    layers = [json.loads(rank.out)["plan"]["layers"] for rank in (first, one)]
    assert layers[0] == layers[1]
    found = renewed(tmp_path)
    assert found.keys() == expected.keys()
    for name, tensors in expected.items():
        for key, values in tensors.items():
            np.testing.assert_allclose(found[name][key], values, rtol=1e-4, atol=1e-5)


def test_more_ranks_than_texts(ranks, ask, workshop, tmp_path):
    (tmp_path / "one.txt").write_text("1+1=2")
    asked = ask("plan", "--answer-tokens", "0", "--json")
    asked = [tmp_path / "one.txt" if item == workshop.scenario else item for item in asked]
    layers = [json.loads(ranks.run(asked, size)[0].out)["plan"]["layers"] for size in (1, 3)]
    assert layers[0] == layers[1]


@pytest.mark.parametrize(
    ("what", "status", "said"),
    [
        ("killed", 2, "rank 1 of 2 on .* was killed, perhaps for want of memory"),
        ("error", 2, "rank 1 of 2 on .*: this rank's own budget is used up. Give it more."),
        pytest.param(
            "hang",
            2,
            "rank 1 of 2 on .* did not answer within 15s.* SPP_TIMEOUT",
            marks=pytest.mark.slow,  # a busy machine may take long until they have met
        ),
        ("ended", 143, "terminated."),
    ],
)
def test_a_rank_that_fails_ends_all_in_one_line(ranks, ask, tmp_path, what, status, said):
    asked = ask("export", "-o", tmp_path / "out", "--answer-tokens", "0")
    timeout = {"SPP_TIMEOUT": "15s"} if what == "hang" else {}
    ended = ranks.run(asked, 2, faults={1: (*OBSERVE, what)}, **timeout)
    line = one_line(ended, status)
    assert re.match(f"error: {said}", line), line
    assert nothing_left(tmp_path)


def test_of_a_killed_first_rank_another_one_tells(ranks, ask, tmp_path):
    asked = ask("export", "-o", tmp_path / "out", "--answer-tokens", "0")
    first, *others = ranks.run(asked, 3, faults={0: (*OBSERVE, "killed")})
    assert first.status == -9
    assert not first.out
    (line,) = [line for other in others for line in other.err.splitlines()]
    assert "rank 0 of 3" in line
    assert "was killed" in line
    assert not any(other.out for other in others)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("size", "options", "said"),
    [
        (1, ["--parallel", "tensor"], "torchrun"),
        (3, ["--parallel", "tensor"], "3 processes cannot share the model's 4 KV heads"),
        (2, ["--parallel", "tensor", "--layerwise"], "Drop --layerwise"),
        (2, ["--device", "cuda:1"], "each of the 2 processes of this machine takes a card"),
    ],
)
def test_ways_to_share_that_cannot_be(ranks, ask, size, options, said):
    assert said in one_line(ranks.run(ask("diagnose", *options), size), 2)


def test_a_usage_error_is_said_once(ranks, tmp_path):
    ended = ranks.run(["export", "--scenario", tmp_path / "none.txt"], 3)
    assert "none.txt" in one_line(ended, 2)
    assert all(rank.status for rank in ended)


def test_a_command_that_needs_no_other_rank(ranks):
    first, *others = ranks.run(["--version"], 3)
    assert first.out.startswith("spp ")
    assert others == [Rank(0, "", "")] * 2


@pytest.mark.slow
def test_artifacts_are_those_of_one_process(ranks, workshop, tmp_path, monkeypatch):
    found = []
    for size in (1, 2, 4):
        monkeypatch.setenv("SPP_CACHE", str(tmp_path / f"cache{size}"))
        out = tmp_path / f"artifacts{size}"
        dense = ("--model", workshop.dense(CASE), "--criteria", "energy,axis,llm-pruner")
        asked = ("probe", "--pools", workshop.pools, "-o", out, *dense, "--answer-tokens", "4")
        assert ranks.run([*asked, "--quiet"], size)[0].status == 0
        found.append({path.name: load_file(path) for path in out.glob("*.safetensors")})
    expected, *others = found
    for other in others:
        assert other.keys() == expected.keys()
        for name, tensors in expected.items():
            for key, values in tensors.items():
                np.testing.assert_allclose(other[name][key], values, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_models_that_run_from_disk(ranks, ask, tmp_path):
    asked = ask("plan", "--layerwise", "--json")
    layers = [json.loads(ranks.run(asked, size)[0].out)["plan"]["layers"] for size in (1, 3)]
    assert layers[0] == layers[1]


def test_the_module_is_the_command():
    command = [sys.executable, "-m", "spp_export", "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert said.stdout.startswith("spp ")

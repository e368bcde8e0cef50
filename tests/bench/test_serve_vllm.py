"""What the benchmark of vLLM makes of its processes' answers; the processes need vLLM."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

import serve_vllm

SAME = [{"ids": [5, 6, 7], "gaps": [1.0, 1.0, 1.0]}]


def rates(wall: float, processor: float) -> dict[str, float]:
    return {"tokens_per_s": wall, "tokens_per_processor_s": processor}


def test_the_speedup_is_the_median_of_ratios_within_rounds():
    results = {"dense": {"rate": [10.0, 20.0, 40.0]}, "slim": {"rate": [15.0, 60.0, 40.0]}}

    assert serve_vllm._speedup(results, "rate") == {"median": 1.5, "rounds": [1.5, 3.0, 1.0]}


@pytest.mark.parametrize(
    ("gap", "problems"),
    [
        (serve_vllm.NEAR_TIE, []),
        (0.06, [(1, "token 1 differs, likeliest by 0.060 nats")]),
    ],
)
def test_only_tokens_that_were_no_near_tie_are_a_problem(gap, problems, capsys):
    expected = [*SAME, {"ids": [5, 6, 7], "gaps": [1.0, gap, 1.0]}]
    # What follows the first difference has another prompt, and says nothing.
    actual = [{"ids": [5, 6, 7]}, {"ids": [5, 8, 9]}]

    assert serve_vllm._differences(expected, actual) == problems
    assert ("a near-tie" in capsys.readouterr().out) == (not problems)


def test_answers_of_other_lengths_are_an_error():
    with pytest.raises(ValueError, match="shorter"):
        serve_vllm._differences(SAME, [{"ids": [5, 6]}])


@pytest.mark.parametrize("other", [[5, 6, 7], [5, 8, 7]])
def test_models_take_turns_and_the_status_says_whether_tokens_agree(
    other, tmp_path, monkeypatch, capsys
):
    out, dense, document = tmp_path / "out", tmp_path / "dense", tmp_path / "vllm.json"
    for directory in (out, dense):
        directory.mkdir()
        (directory / "config.json").write_text("{}")
    (out / "plan.json").write_text(json.dumps({"predicted": {"decode": 1.5}}))
    steps: list[tuple[str, str]] = []

    def run(step: str, directory: str, options: Any, scratch: Any) -> Any:
        name = "slim" if directory == str(out) else "dense"
        steps.append((step, name))
        if step == "throughput":
            faster = 1.5 if name == "slim" else 1.0
            return {**rates(10 * faster, 20 * faster), "kv_tokens": 128, "machine": {}}
        return SAME if step == "transformers" else [{"ids": other}]

    monkeypatch.setattr(serve_vllm, "_run", run)
    words = [str(out), "--model", str(dense), "--device", "cpu", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["serve_vllm.py", *words, "--json", str(document)])

    agree = other == SAME[0]["ids"]
    assert serve_vllm.main() == (0 if agree else 1)

    compared = [(step, name) for name in ("dense", "slim") for step in ("transformers", "vllm")]
    assert steps == [*compared, *[("throughput", "dense"), ("throughput", "slim")] * 2]
    written = json.loads(document.read_text())
    assert written["speedup_in_tokens_per_s"] == {"median": 1.5, "rounds": [1.5, 1.5]}
    assert written["models"]["slim"]["tokens_per_processor_s"] == [30, 30]
    assert written["models"]["dense"]["kv_tokens"] == 128
    assert written["predicted"] == {"decode": 1.5}
    assert written["enforce_eager"] is False
    assert {"git", "device", "dtype", "batch", "context", "new_tokens"} <= written.keys()
    assert len(written["problems"]) == (0 if agree else 2)
    assert "slim over dense, tokens_per_s: 1.500" in capsys.readouterr().out

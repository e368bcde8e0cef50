"""All graphs in one process, in turn: what they compute first, then how long it takes."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spp_bench.timing import quantiles
from spp_campaigns.onnx_exporters.runners import (
    GrowingRunner,
    Runner,
    SharedRunner,
    Tokens,
    TorchRunner,
    open_sessions,
)

REFERENCE = "PyTorch sdpa"
SHARED = ", shared KV"
# Above the rounding of another order of operations in fp32, relative to the largest logit.
_ROUNDING = 1e-3
_NODE = re.compile(r"while running (\w+) node")
_ENOUGH = 120


@dataclass(frozen=True)
class Workload:
    """A prompt of random tokens and random tokens after it, the same for everyone."""

    prompt: int = 128
    new: int = 32
    rounds: int = 7
    threads: int = 2

    def tokens(self, vocab: int) -> Tokens:
        """[1, prompt + new]."""
        random = np.random.default_rng(0)
        return random.integers(0, vocab, (1, self.prompt + self.new), dtype=np.int64)


def compare(
    slim: Path, vocab: int, graphs: Mapping[str, Sequence[Path]], work: Workload
) -> dict[str, dict[str, Any]]:
    """By name, and by name and ", shared KV" where a graph takes that: differences and times.

    What cannot run has {"error"}, or {"shared_kv"} with the reason where only that failed. A graph
    whose logits are off by more than rounding is not timed.
    """
    tokens = work.tokens(vocab)
    reference = TorchRunner(slim, work.threads)
    expected = _logits(reference, tokens, work)
    runners: dict[str, Runner] = {REFERENCE: reference}
    rows: dict[str, dict[str, Any]] = {REFERENCE: {}}
    for name, paths in graphs.items():
        sessions: list[Any] = []
        try:
            sessions = open_sessions(list(paths), work.threads)
            rows[name] = {}
            _admit(name, GrowingRunner(sessions), rows, runners, expected, tokens, work)
        except Exception as error:  # whatever a foreign graph does is a result
            rows[name] = {"error": _first_line(error)}
            continue
        if len(sessions) > 1:
            rows[name]["shared_kv"] = "no: the graph of the prompt has no past"
            continue
        try:
            shared = SharedRunner(sessions[0], work.prompt + work.new)
            _admit(name + SHARED, shared, rows, runners, expected, tokens, work)
            rows[name]["shared_kv"] = "yes"
        except Exception as error:
            rows.pop(name + SHARED, None)
            rows[name]["shared_kv"] = f"no: {_first_line(error)}"
    for name, times in _times(runners, tokens, work).items():
        rows[name].update(times)
    return rows


def _admit(
    name: str,
    runner: Runner,
    rows: dict[str, dict[str, Any]],
    runners: dict[str, Runner],
    expected: tuple[NDArray[np.float32], NDArray[np.float32]],
    tokens: Tokens,
    work: Workload,
) -> None:
    """Differences into `rows`, and the runner among those to be timed; ValueError if it is off."""
    got = _logits(runner, tokens, work)
    largest = float(max(np.abs(part).max() for part in expected))
    pairs = zip(("prefill", "decode"), got, expected, strict=True)
    off = {f"{stage}_diff": float(np.abs(ours - theirs).max()) for stage, ours, theirs in pairs}
    if not max(off.values()) <= _ROUNDING * largest:
        raise ValueError(
            f"logits differ by {off['prefill_diff']:.3g} (prompt) and {off['decode_diff']:.3g} "
            f"(decoding) from PyTorch's, whose largest is {largest:.3g}"
        )
    same = [(a.argmax(-1) == b.argmax(-1)).mean() for a, b in zip(got, expected, strict=True)]
    rows[name] = {**off, "largest_logit": largest, "same_argmax": float(min(same))}
    runners[name] = runner


def _logits(
    runner: Runner, tokens: Tokens, work: Workload
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Of the prompt [1, prompt, V], and of the tokens after it [1, new, V], one at a time."""
    runner.prefill(_prompt(tokens, work))
    prompt = runner.logits()
    steps = []
    for token in _steps(tokens, work):
        runner.decode(token)
        steps.append(runner.logits())
    return prompt, np.concatenate(steps, axis=1)


def _prompt(tokens: Tokens, work: Workload) -> Tokens:
    return np.ascontiguousarray(tokens[:, : work.prompt])


def _steps(tokens: Tokens, work: Workload) -> Iterator[Tokens]:
    for column in range(work.prompt, work.prompt + work.new):
        yield np.ascontiguousarray(tokens[:, column : column + 1])


def _times(
    runners: Mapping[str, Runner], tokens: Tokens, work: Workload
) -> dict[str, dict[str, float]]:
    """Everyone once a round, starting with another one each; the first round is not counted."""
    prefill: dict[str, list[float]] = {name: [] for name in runners}
    decode: dict[str, list[float]] = {name: [] for name in runners}
    names = list(runners)
    for turn in range(-1, work.rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            runner = runners[name]
            start = time.perf_counter()
            runner.prefill(_prompt(tokens, work))
            prompted = time.perf_counter()
            for token in _steps(tokens, work):
                runner.decode(token)
            end = time.perf_counter()
            if turn >= 0:
                prefill[name].append(1e3 * (prompted - start))
                decode[name].append(1e3 * (end - prompted) / work.new)
    return {
        name: {
            **{f"prefill_{key}": value for key, value in quantiles(prefill[name], "ms").items()},
            **{f"decode_{key}": value for key, value in quantiles(decode[name], "ms").items()},
        }
        for name in names
    }


def _first_line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
    # onnxruntime puts its own function's signature between the node and what is wrong with it.
    if node := _NODE.search(text):
        text = f"{node[1]}: ...{text[-_ENOUGH:]}"
    return f"{type(error).__name__}: {text}"[: 2 * _ENOUGH]

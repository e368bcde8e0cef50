"""All graphs in one process: first whether they compute the right logits, then, in turns, how long
it takes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spp_bench.cases import Cell, Tokens, tokens
from spp_bench.engines.torch import TorchRunner
from spp_bench.measure import PHASES, measure_cell
from spp_bench.timing import quantiles
from spp_campaigns.onnx_exporters.runners import (
    GrowingRunner,
    Logits,
    SharedRunner,
    open_sessions,
)
from spp_export.models.loader import load_slim

REFERENCE = "PyTorch sdpa"
SHARED = ", shared KV"
# More than another order of operations rounds in fp32, relative to the largest logit.
_ROUNDING = 1e-3
_NODE = re.compile(r"while running (\w+) node")
_ENOUGH = 120


@dataclass(frozen=True)
class Workload:
    """A prompt of random tokens, and random tokens after it."""

    prompt: int = 128
    new: int = 32
    rounds: int = 7
    threads: int = 2

    def tokens(self, vocab: int) -> Tokens:
        """The same for everyone."""
        return tokens(Cell(1, self.prompt), self.new, vocab)


def compare(
    slim: Path, vocab: int, graphs: Mapping[str, Sequence[Path]], work: Workload
) -> dict[str, dict[str, Any]]:
    """Differences and times by name, and also by name plus ", shared KV" where a graph supports
    that.

    What cannot run has {"error"}, or {"shared_kv"} with the reason where only that failed. A graph
    whose logits are off by more than rounding is not timed.
    """
    fed = work.tokens(vocab)
    torch.set_num_threads(work.threads)
    model = load_slim(slim, dtype=torch.float32, attn_implementation="sdpa")
    expected = _reference(model, fed)
    # All logits of a prompt, as the graphs give them.
    runners: dict[str, Any] = {REFERENCE: TorchRunner(REFERENCE, model, logits_to_keep=0)}
    rows: dict[str, dict[str, Any]] = {REFERENCE: {}}
    for name, paths in graphs.items():
        sessions: list[Any] = []
        try:
            sessions = open_sessions(list(paths), work.threads)
            rows[name] = {}
            _admit(GrowingRunner(name, sessions), rows, runners, expected, fed)
        except Exception as error:  # any failure of a foreign graph is a result
            rows[name] = {"error": _first_line(error)}
            continue
        if len(sessions) > 1:
            rows[name]["shared_kv"] = "no: the graph of the prompt has no past"
            continue
        try:
            shared = SharedRunner(name + SHARED, sessions[0], work.prompt + work.new)
            _admit(shared, rows, runners, expected, fed)
            rows[name]["shared_kv"] = "yes"
        except Exception as error:
            rows.pop(name + SHARED, None)
            rows[name]["shared_kv"] = f"no: {_first_line(error)}"
    for name, samples in measure_cell(list(runners.values()), fed, work.rounds).items():
        for phase in PHASES:
            times = quantiles([1e3 * seconds for seconds in samples.of(phase)], "ms")
            rows[name] |= {f"{phase}_{key}": value for key, value in times.items()}
    return rows


def _admit(
    runner: GrowingRunner | SharedRunner,
    rows: dict[str, dict[str, Any]],
    runners: dict[str, Any],
    expected: tuple[Logits, Logits],
    fed: Tokens,
) -> None:
    """Add differences to `rows`, and the runner to those that are timed; ValueError if it is
    off."""
    computed = _logits(runner, fed)
    largest = float(max(np.abs(part).max() for part in expected))
    pairs = list(zip(computed, expected, strict=True))
    off = {
        f"{phase}_diff": float(np.abs(ours - theirs).max())
        for phase, (ours, theirs) in zip(PHASES, pairs, strict=True)
    }
    if not max(off.values()) <= _ROUNDING * largest:
        raise ValueError(
            f"logits differ by {off['prefill_diff']:.3g} (prompt) and {off['decode_diff']:.3g} "
            f"(decoding) from PyTorch's, whose largest is {largest:.3g}"
        )
    same = [(ours.argmax(-1) == theirs.argmax(-1)).mean() for ours, theirs in pairs]
    rows[runner.name] = {**off, "largest_logit": largest, "same_argmax": float(min(same))}
    runners[runner.name] = runner


def _logits(runner: GrowingRunner | SharedRunner, fed: Tokens) -> tuple[Logits, Logits]:
    """Logits of the prompt [1,prompt,V], and of the tokens after it [1,new,V], fed one at a
    time."""
    runner.prefill(fed.prompt)
    prompt = runner.logits()
    steps = []
    for column in fed.continuation.T:
        runner.decode(column[:, None])
        steps.append(runner.logits())
    return prompt, np.concatenate(steps, axis=1)


def _reference(model: Any, fed: Tokens) -> tuple[Logits, Logits]:
    """The same from PyTorch, in one pass without a cache."""
    ids = torch.from_numpy(np.concatenate([fed.prompt, fed.continuation], axis=1))
    with torch.inference_mode():
        logits: Logits = model(input_ids=ids, use_cache=False).logits.numpy()
    split = fed.prompt.shape[1]
    return logits[:, :split], logits[:, split:]


def _first_line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
    # onnxruntime puts the signature of its own function between the node and its error.
    if node := _NODE.search(text):
        text = f"{node[1]}: ...{text[-_ENOUGH:]}"
    return f"{type(error).__name__}: {text}"[: 2 * _ENOUGH]

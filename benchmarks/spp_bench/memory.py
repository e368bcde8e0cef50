"""Memory of every model, each in a fresh process, and whether it is what the plan promised."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from spp_bench.candidates import Candidate
from spp_bench.cases import Cell
from spp_bench.memory_child import Job
from spp_export.common.errors import ModelError

# How far weights and KV cache may be from what the plan predicts.
AGREE_WITHIN = 0.02


def measure_memory(
    candidate: Candidate, cells: Sequence[Cell], new_tokens: int, device: str, threads: int
) -> dict[str, Any]:
    """What a fresh process that runs this model holds, beside the prediction.

    Raises ModelError where the process fails.
    """
    job = Job(candidate, tuple(cells), new_tokens, device, threads)
    result = subprocess.run(
        [sys.executable, "-m", "spp_bench.memory_child"],
        input=pickle.dumps(job),
        capture_output=True,
    )
    if result.returncode:
        lines = result.stderr.decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else f"exit status {result.returncode}"
        raise ModelError(f"{candidate.name}: measuring its memory failed: {reason}")
    found: dict[str, Any] = json.loads(result.stdout)
    return with_prediction(candidate, found, new_tokens)


def with_prediction(
    candidate: Candidate, found: Mapping[str, Any], new_tokens: int
) -> dict[str, Any]:
    """The figures of a child beside what the plan says, and what differs by more than 2 %."""
    weights = candidate.predicted_bytes
    cells = []
    problems = _problem("weights", found["weight_bytes"], weights)
    for cell in found["cells"]:
        expected = predicted_kv(candidate, Cell(cell["batch"], cell["context"]), new_tokens)
        cells.append({**cell, "predicted_kv_bytes": expected})
        where = f"KV cache at batch {cell['batch']}, context {cell['context']}"
        problems += _problem(where, cell["kv_bytes"], expected)
    return {
        "name": candidate.name,
        **found,
        "predicted_weight_bytes": weights,
        "cells": cells,
        "problems": problems,
    }


def predicted_kv(candidate: Candidate, cell: Cell, new_tokens: int) -> int:
    """Bytes of the cache after a cell: every token that was fed.

    PyTorch drops what a sliding window no longer sees, up to the window less the token to come;
    ONNX Runtime keeps all.
    """
    length = cell.context + new_tokens + candidate.spare_tokens
    sizes = candidate.sizes
    windows = sizes.windows if candidate.engine == "torch" else [None] * len(sizes.layers)
    heads = sum(
        layer.kv_heads * (length if window is None else min(length, window - 1))
        for layer, window in zip(sizes.layers, windows, strict=True)
    )
    return cell.batch * 2 * sizes.shape.head_dim * sizes.kv_element_bytes * heads


def _problem(what: str, found: int, expected: int | None) -> list[str]:
    if expected is None or abs(found - expected) <= AGREE_WITHIN * expected:
        return []
    return [f"{what}: {found} bytes, the plan predicts {expected}"]

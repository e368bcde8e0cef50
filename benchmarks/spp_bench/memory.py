"""Memory of every model, each in a fresh process, and whether it is what the plan predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spp_bench.candidates import Candidate
from spp_bench.cases import Cell, tokens
from spp_bench.engines.open import open_runner
from spp_bench.engines.runner import Runner
from spp_bench.processes import held, peak, restart_peak, run_fresh, status_bytes
from spp_export.common.errors import ModelError

# How far weights and KV cache may be from what the plan predicts.
AGREE_WITHIN = 0.02


def measure_memory(
    candidate: Candidate, cells: Sequence[Cell], new_tokens: int, device: str, threads: int
) -> dict[str, Any]:
    """What a fresh process that runs this model holds, beside the prediction.

    Raises ModelError where the process fails.
    """
    measured = run_fresh(hold, candidate, tuple(cells), new_tokens, device, threads)
    if "error" in measured:
        raise ModelError(f"{candidate.name}: measuring its memory failed: {measured['error']}")
    return with_prediction(candidate, measured, new_tokens)


def hold(
    candidate: Candidate, cells: Sequence[Cell], new_tokens: int, device: str, threads: int
) -> dict[str, Any]:
    """Load a model in this process, run every cell once, and return the most memory that was
    held."""
    _import_engine(candidate.engine, device, threads)
    before = held(device)
    restart_peak(device)
    runner = open_runner(candidate, device, threads)
    loading = peak(device) + _elsewhere(runner, "VmHWM")
    after = held(device) + _elsewhere(runner, "VmRSS")
    records = []
    for cell in sorted(cells):
        restart_peak(device)
        fed = tokens(cell, new_tokens, candidate.sizes.shape.vocab_size)
        runner.reserve(cell.context + new_tokens)
        runner.prefill(fed.prompt)
        runner.decode(fed.continuation)
        most = peak(device) + _elsewhere(runner, "VmHWM")
        # After the peak: some engines give the sizes of their cache only by copying it.
        records.append({**cell.to_dict(), "kv_bytes": runner.kv_bytes(), "peak_bytes": most})
        runner.forget()
    return {
        "weight_bytes": runner.weight_bytes,
        "before_bytes": before,
        "loaded_bytes": after,
        "loading_peak_bytes": loading,
        "cells": records,
    }


def _elsewhere(runner: Runner, field: str) -> int:
    """What an engine in a process of its own holds there, beyond what that held without a model."""
    engine = getattr(runner, "engine", None)
    return status_bytes(field, engine.process_id) - engine.empty_bytes if engine else 0


def _import_engine(engine: str, device: str, threads: int) -> None:
    """Import what every model of this engine needs, so that no model is charged for it."""
    if engine in ("torch", "graph"):
        import torch

        import spp_bench.engines.static
        import spp_bench.engines.torch

        torch.set_num_threads(threads)
        if device.startswith("cuda"):
            torch.zeros(1, device=device)
    elif engine == "onnx":
        import spp_bench.engines.ort
    elif engine == "gguf":
        import spp_bench.engines.gguf
    else:
        import spp_bench.engines.genai  # noqa: F401


def with_prediction(
    candidate: Candidate, measured: Mapping[str, Any], new_tokens: int
) -> dict[str, Any]:
    """The figures of a process beside what the plan says, and what differs by more than 2 %."""
    weights = candidate.predicted_bytes
    cells = []
    problems = _problem("weights", measured["weight_bytes"], weights)
    for cell in measured["cells"]:
        expected = predicted_kv(candidate, Cell(cell["batch"], cell["context"]), new_tokens)
        cells.append({**cell, "predicted_kv_bytes": expected})
        where = f"KV cache at batch {cell['batch']}, context {cell['context']}"
        problems += _problem(where, cell["kv_bytes"], expected)
    return {
        "name": candidate.name,
        **measured,
        "predicted_weight_bytes": weights,
        "cells": cells,
        "problems": problems,
    }


def predicted_kv(candidate: Candidate, cell: Cell, new_tokens: int) -> int:
    """Bytes of the cache after a cell: every token that was fed.

    PyTorch keeps only what a sliding window still sees: its width less one, for the token to come.
    ONNX Runtime and llama.cpp keep everything.
    """
    length = cell.context + new_tokens + candidate.spare_tokens
    length += -length % candidate.cache_block
    sizes = candidate.sizes
    windows = sizes.windows if candidate.engine == "torch" else [None] * len(sizes.layers)
    heads = sum(
        layer.kv_heads * (length if window is None else min(length, window - 1))
        for layer, window in zip(sizes.layers, windows, strict=True)
    )
    return cell.batch * 2 * sizes.shape.head_dim * sizes.kv_element_bytes * heads


def _problem(what: str, measured: int, expected: int | None) -> list[str]:
    if expected is None or abs(measured - expected) <= AGREE_WITHIN * expected:
        return []
    return [f"{what}: {measured} bytes, the plan predicts {expected}"]

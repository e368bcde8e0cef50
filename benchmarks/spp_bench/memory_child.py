"""Memory of one model in a process of its own: `python -m spp_bench.memory_child`.

Reads a job from standard input, as `spp_bench.memory` writes it, and prints what it found as JSON.
"""

from __future__ import annotations

import json
import pickle
import resource
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from spp_bench.candidates import Candidate
from spp_bench.cases import Cell, tokens
from spp_bench.engines.open import open_runner

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Job:
    """A model, and the cells to run it in."""

    candidate: Candidate
    cells: tuple[Cell, ...]
    new_tokens: int
    device: str
    threads: int


def measure(job: Job) -> dict[str, Any]:
    """Load the model, run every cell once, and tell what was held at most each time."""
    import_engine(job)
    before = held(job.device)
    _restart_peak(job.device)
    runner = open_runner(job.candidate, job.device, job.threads)
    loading, after = peak(job.device), held(job.device)
    cells = []
    for cell in sorted(job.cells):
        _restart_peak(job.device)
        fed = tokens(cell, job.new_tokens, job.candidate.sizes.shape.vocab_size)
        runner.reserve(cell.context + job.new_tokens)
        runner.prefill(fed.prompt)
        runner.decode(fed.continuation)
        most = peak(job.device)
        # After the peak: some engines tell the sizes of their cache by copying it.
        cells.append({**cell.to_dict(), "kv_bytes": runner.kv_bytes(), "peak_bytes": most})
        runner.forget()
    return {
        "weight_bytes": runner.weight_bytes,
        "before_bytes": before,
        "loaded_bytes": after,
        "loading_peak_bytes": loading,
        "cells": cells,
    }


def import_engine(job: Job) -> None:
    """What every model of this engine needs is no model's memory."""
    if job.candidate.engine in ("torch", "graph"):
        import torch

        import spp_bench.engines.static
        import spp_bench.engines.torch

        torch.set_num_threads(job.threads)
        if job.device.startswith("cuda"):
            torch.zeros(1, device=job.device)
    elif job.candidate.engine == "onnx":
        import spp_bench.engines.ort
    else:
        import spp_bench.engines.genai  # noqa: F401


def held(device: str) -> int:
    """Bytes held now: what PyTorch allocated on the card, or this process's resident memory."""
    if _on_card(device):
        import torch

        return torch.cuda.memory_allocated(device)
    return _status("VmRSS") or _resource_peak()


def peak(device: str) -> int:
    """Bytes held at most since `_restart_peak`, or since the start where that is not possible."""
    if _on_card(device):
        import torch

        return torch.cuda.max_memory_allocated(device)
    # Not getrusage's first: it may still be the parent's, which had this process's memory before.
    return _status("VmHWM") or _resource_peak()


def _on_card(device: str) -> bool:
    return device.startswith("cuda") and "torch" in sys.modules


def _restart_peak(device: str) -> None:
    if _on_card(device):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # Linux alone
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status(key: str) -> int | None:
    if not _STATUS.exists():
        return None
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None


def _resource_peak() -> int:
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def main(stream: BinaryIO) -> None:
    """Run the job on a stream that our own parent process wrote."""
    job: Job = pickle.load(stream)
    print(json.dumps(measure(job)))


if __name__ == "__main__":
    main(sys.stdin.buffer)

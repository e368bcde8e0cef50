"""One export in this process: `python -m spp_campaigns.peers.child NAME MODEL PLAN OUT FILE`.

FILE becomes the seconds after imports, until the call returns and until its files are on the disk,
and the largest resident memory above what the imports hold.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from spp_bench.memory_child import held, peak
from spp_campaigns.peers.candidates import CANDIDATES
from spp_export.planning import read_plan


def main(arguments: Sequence[str]) -> None:
    """Export and write the measurements; a failure is the exception's."""
    name, model, plan_file, out, answer = arguments
    warnings.simplefilter("ignore")
    export = CANDIDATES[name].prepare(Path(model))
    plan = read_plan(plan_file)
    before = held("cpu")
    start = time.perf_counter()
    export(Path(model), plan, Path(out))
    returned = time.perf_counter()
    most = peak("cpu")
    for path in Path(out).iterdir():
        _flush(path)
    measured = {
        "seconds": round(returned - start, 3),
        "flushed_seconds": round(time.perf_counter() - start, 3),
        "imports_bytes": before,
        "peak_bytes": max(0, most - before),
    }
    Path(answer).write_text(json.dumps(measured), encoding="utf-8")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    main(sys.argv[1:])

"""One export: `python -m spp_campaigns.onnx_exporters.child NAME SLIM_DIR OUT FILE`.

FILE becomes {"seconds", "peak_mb"}: the time after imports, and the largest resident memory above
what the imports take. Linux only, where /proc tells both.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from spp_campaigns.onnx_exporters.candidates import CANDIDATES


def main(arguments: Sequence[str]) -> None:
    """Export and write the measurements; a failure is the exception's."""
    name, slim, out, answer = arguments
    warnings.simplefilter("ignore")
    export = CANDIDATES[name].prepare()
    before = _memory_kb("VmRSS")
    start = time.perf_counter()
    export(Path(slim), Path(out))
    seconds = time.perf_counter() - start
    peak = max(0, _memory_kb("VmHWM") - before)
    measured = {"seconds": round(seconds, 3), "peak_mb": round(peak * 1024 / 1e6, 1)}
    Path(answer).write_text(json.dumps(measured), encoding="utf-8")


def _memory_kb(field: str) -> int:
    """Of this process alone: what getrusage tells includes the parent's before it was ours."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status: no {field}.")


if __name__ == "__main__":
    main(sys.argv[1:])

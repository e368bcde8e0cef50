"""Time until the command line answers: `python -m spp_campaigns.start_time [--json]`.

One sample is a fresh process; help must come before anything heavy is imported, and a sample whose
process imported it fails the run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from spp_bench.timing import quantiles
from spp_campaigns.machine import machine

CASES = (("--help",), ("export", "--help"), ("plan", "--help"), ("--version",))
HEAVY = ("torch", "transformers", "numpy")
_SCRIPT = f"""
import sys
from spp_cli.main import run
status = run(sys.argv[1:])
sys.exit(status or sum(name in sys.modules for name in {HEAVY!r}))
"""


def measure(arguments: Sequence[str], samples: int) -> dict[str, Any]:
    """Quantiles of the wall time, in seconds, of one command line."""
    times = []
    for sample in range(-1, samples):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", _SCRIPT, *arguments], check=True, stdout=subprocess.DEVNULL
        )
        if sample >= 0:  # the first run fills the file cache
            times.append(time.perf_counter() - start)
    return {
        "arguments": " ".join(arguments),
        "samples": samples,
        **quantiles(times, "s"),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table, or with --json one JSON object."""
    parser = argparse.ArgumentParser(prog="spp_campaigns.start_time", description=__doc__)
    parser.add_argument("--samples", type=int, default=9, help="processes per command line")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    results = [measure(case, options.samples) for case in CASES]
    if options.json:
        print(json.dumps({"machine": machine(), "results": results}))
        return
    print(" ".join(f"{name}: {value}" for name, value in machine().items()))
    print(f"{'command':20} {'median':>8} {'p20':>8} {'p80':>8}  s")
    for row in results:
        print(
            f"spp {row['arguments']:16} {row['median_s']:8.3f} {row['p20_s']:8.3f} "
            f"{row['p80_s']:8.3f}"
        )


if __name__ == "__main__":
    main()

"""Time until the command line answers: `python -m spp_campaigns.start_time [--json FILE]`.

One sample is a fresh process. Help must be printed without importing anything heavy; a process
that imports such a module fails the run.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from spp_bench.timing import quantiles
from spp_campaigns.command import finish, machine, parser, table, words

CASES = (("--help",), ("export", "--help"), ("plan", "--help"), ("--version",))
HEAVY = ("torch", "transformers", "numpy")
_COLUMNS = {
    "command": "spp {arguments}",
    "median s": "{median_s:.3f}",
    "p20": "{p20_s:.3f}",
    "p80": "{p80_s:.3f}",
}
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
    """Print a table."""
    made = parser(__doc__)
    made.add_argument("--samples", type=int, default=9, help="processes per command line")
    options = made.parse_args(arguments)
    rows = [measure(case, options.samples) for case in CASES]
    document: dict[str, Any] = {"machine": machine(), "results": rows}
    finish(options, document, words(document["machine"]), table(_COLUMNS, rows))


if __name__ == "__main__":
    main()

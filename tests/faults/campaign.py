"""Exports that are killed, starved, interrupted and raced: `python tests/faults/campaign.py`.

Prints how many cases of each fault were tried and what they left. Ends with status 1 at the first
promise that did not hold, naming the case.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import signal
import sys
import tempfile
from pathlib import Path

# Before torch and transformers are imported. One thread: a forked child has no other.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}

import stopping
import surroundings
from tally import Tally
from workbench import BrokenPromiseError, Workbench, promise

# Its identifier of a session of telemetry.
ONNX_RUNTIME_OWN = ".ses"
# Cases of each fault: in the whole campaign, and in the part that every test run has.
STOPPED = (
    (signal.SIGKILL, 200, 3),
    (signal.SIGINT, 40, 1),
    (signal.SIGTERM, 40, 1),
    (signal.SIGHUP, 8, 1),
)


def main() -> int:
    """The process's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=0, help="decides every moment and step")
    parser.add_argument("--small", action="store_true", help="some ten cases only")
    parser.add_argument("--rounds", type=int, default=1, help="so many, each with the next seed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="spp-faults-") as folder:
        root = Path(folder)
        root.chmod(0o755)  # for the child that is nobody
        for variable in ("SPP_CACHE", "TMPDIR", "HF_HOME", "HF_MODULES_CACHE"):
            (root / variable).mkdir()
            os.environ[variable] = str(root / variable)
        tempfile.tempdir = None
        tally = Tally()
        try:
            bench = Workbench(root)
            gc.freeze()  # or the collector of every child copies what it shares with its parent
            for seed in range(options.seed, options.seed + options.rounds):
                campaign(bench, tally, random.Random(seed), options.small)
                left = {path.name for path in (root / "TMPDIR").iterdir()} - {ONNX_RUNTIME_OWN}
                left |= {path.name for path in (root / "SPP_CACHE").rglob(".*")}
                promise(not left, f"left in TMPDIR or in the cache, seed {seed}: {left}")
        except BrokenPromiseError as error:
            print(error, file=sys.stderr)
            return 1
        tally.show()
    return 0


def campaign(bench: Workbench, tally: Tally, rng: random.Random, small: bool) -> None:
    """Every fault, so many times."""
    for number, many, few in STOPPED:
        stopping.stop(bench, tally, rng, number, few if small else many)
    stopping.interrupt_twice(bench, tally, rng, 1 if small else 20)
    stopping.kill_without_exchange(bench, tally, rng, 1 if small else 20)
    surroundings.failing_calls(bench, tally, rng, 2 if small else 64)
    surroundings.changing_source(bench, tally, rng, 2 if small else 40)
    surroundings.two_at_once(bench, tally, rng, 1 if small else 24)
    if not small:
        surroundings.limited_files(bench, tally, rng, 24)
        surroundings.full_disk(bench, tally, rng, 24)
        surroundings.no_permission(bench, tally, rng)
        surroundings.another_file_system(bench, tally)
        surroundings.nobody_reads(bench, tally)
        stopping.kill_other_commands(bench, tally, rng, 18)
        stopping.real_command_line(bench, tally, rng, 6)


if __name__ == "__main__":
    sys.exit(main())

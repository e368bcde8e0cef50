"""The demo scenario's plan by several processes: `python -m spp_campaigns.distributed`.

torchrun starts 1, 2 and 4 of them. Each run has a cache of its own, so that all passes are made.
Plans must keep the same units, and what was gathered must be that of one process within rounding. A
last run of two loses the second of them to SIGKILL: it must end in one line of ours, with nothing
published.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from safetensors.numpy import load_file

from spp_campaigns.command import empty_cache, finish, machine, parser, scratch
from spp_export.models.hub import demo_model

_SCENARIO = "benchmarks/data/scenarios/chemistry.txt"
_POLL_S = 0.2
# Of the second process, until it is killed: it is then in the middle of a pass.
_BUSY_S = 10.0


def command(processes: int, *arguments: str) -> list[str]:
    """A command of spp on so many processes."""
    torchrun = ["torch.distributed.run", "--nproc-per-node", str(processes), "-m", "spp_export"]
    return [sys.executable, "-m", *torchrun, *arguments]


def planned(
    processes: int, place: Path, scenario: str
) -> tuple[Any, Mapping[str, Mapping[str, Any]]]:
    """The layers of the scenario's plan, and the statistics by file that were gathered for it."""
    plan = place / f"plan-{processes}.json"
    with empty_cache(place / f"cache-{processes}") as environment:
        asked = ("plan", "--scenario", scenario, "-o", str(plan), "--quiet")
        subprocess.run(command(processes, *asked), env=environment, check=True)
        files = sorted(Path(environment["SPP_CACHE"], "statistics").glob("*.safetensors"))
        return json.loads(plan.read_bytes())["layers"], {
            path.name: load_file(path) for path in files
        }


def farthest(found: Mapping[str, Mapping[str, Any]], one: Mapping[str, Mapping[str, Any]]) -> float:
    """The largest distance between tensors, as a share of their length."""
    if found.keys() != one.keys():
        raise SystemExit("statistics of other texts were gathered")
    shares = [0.0]
    for file, tensors in one.items():
        for name, values in tensors.items():
            length = float(np.linalg.norm(values))
            shares.append(float(np.linalg.norm(found[file][name] - values)) / (length or 1.0))
    return max(shares)


def killed(place: Path, scenario: str) -> list[str]:
    """Our lines on stderr of an export whose second process is killed in the middle of its work."""
    out = place / "killed"
    with empty_cache(place / "cache-killed") as environment:
        asked = command(2, "export", "--scenario", scenario, "-o", str(out), "--quiet")
        running = subprocess.Popen(
            asked, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        while running.poll() is None:
            time.sleep(_POLL_S)
            second = _of_rank(running.pid, "1")
            if second and second.cpu_times().user > _BUSY_S:
                second.send_signal(signal.SIGKILL)
                break
        said, errors = running.communicate()
    if said or out.exists() or list(place.glob(".killed*")):
        raise SystemExit("an export that lost a process published something")
    return [line for line in errors.splitlines() if line.startswith(("error:", "warning:"))]


def _of_rank(torchrun: int, rank: str) -> psutil.Process | None:
    for child in psutil.Process(torchrun).children():
        try:
            if child.environ().get("RANK") == rank:
                return child
        except psutil.Error:  # it ends
            continue
    return None


def main(arguments: Sequence[str] | None = None) -> None:
    """Exits with 1 where a plan is another one, or the killed run says anything else."""
    made = parser(__doc__, writes=True)
    made.add_argument("--scenario", default=_SCENARIO)
    made.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    options = made.parse_args(arguments)
    demo_model()
    with scratch(options) as place:
        layers, one = planned(1, place, options.scenario)
        rows: dict[str, dict[str, Any]] = {}
        for processes in options.processes:
            found, statistics = planned(processes, place, options.scenario)
            rows[str(processes)] = {
                "same_plan": found == layers,
                "distance": float(f"{farthest(statistics, one):.2g}"),
            }
        said = killed(place, options.scenario)
    lines = [
        f"{processes} processes: {'the same plan' if row['same_plan'] else 'ANOTHER PLAN'}, "
        f"statistics differ by {row['distance']:.1e} of their length at most"
        for processes, row in rows.items()
    ]
    finish(options, {"machine": machine(), "processes": rows, "killed": said}, *lines, *said)
    one_line = len(said) == 1 and "rank 1 of 2" in said[0] and "was killed" in said[0]
    if not one_line or not all(row["same_plan"] for row in rows.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

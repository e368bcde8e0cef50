"""This version beside an earlier one: `python -m spp_campaigns.versions COMMIT [--json FILE]`.

The commit is checked out and installed in an environment of its own. Then the two take turns: the
demo scenario is planned with nothing in the cache but the default model, and a random bf16 model of
1 GB is written as ONNX by either version's own campaign of sizes, which measures `cp` of the same
files beside it. Planning of this version answers the scenario's prompts, unless it is told not to;
both ways are measured.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spp_campaigns.big_checkpoints import touch_memory
from spp_campaigns.command import empty_cache, finish, machine, parser, scratch
from spp_export.models.hub import demo_model

_ROOT = Path(__file__).resolve().parents[2]
_SCENARIO = "benchmarks/data/scenarios/chemistry.txt"
_EXTRAS = ".[onnx]"
# An earlier version has its campaigns in this package.
_EARLIER_CAMPAIGNS = "spp_bench"
# Earlier campaigns do not do so themselves.
_TOUCHED_BYTES = 4_000_000_000


def install(commit: str, place: Path) -> Path:
    """The folder of a commit's sources, with an environment `.venv` that its constraints hold."""
    root = place / commit
    subprocess.run(["git", "-C", str(_ROOT), "worktree", "prune"], check=True)
    added = ["worktree", "add", "--quiet", "--detach", str(root), commit]
    subprocess.run(["git", "-C", str(_ROOT), *added], check=True)
    subprocess.run([sys.executable, "-m", "venv", str(root / ".venv")], check=True)
    asked = ["--quiet", "--disable-pip-version-check", "--constraint", "constraints.txt"]
    python = str(root / ".venv/bin/python")
    subprocess.run(
        [python, "-m", "pip", "install", *asked, "--editable", _EXTRAS], cwd=root, check=True
    )
    return root


def planning(python: Path, root: Path, cache: Path, *more: str) -> dict[str, float]:
    """Wall and processor seconds of `spp plan` with nothing in its cache but the default model."""
    with empty_cache(cache) as environment:
        spp = str(python.with_name("spp"))
        asked = [spp, "plan", "--scenario", _SCENARIO, "-o", str(cache / "plan.json"), *more]
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(asked, cwd=root, env=environment, stdout=subprocess.DEVNULL, check=True)
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(wall, 2), "processor_seconds": round(used, 2)}


def onnx(python: Path, root: Path, campaigns: str, place: Path) -> dict[str, float]:
    """Seconds of writing 1 GB as ONNX, and how often `cp` of it would fit into that."""
    found = place / "scale.json"
    asked = [str(python), "-m", f"{campaigns}.scale", "--gigabytes", "1", "--repeats", "3"]
    folders = [str(root), *(str(root / name) for name in ("cli", "kernels", "benchmarks"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    touch_memory(_TOUCHED_BYTES)
    # Its exit code says whether its limits are held, which is not asked here.
    subprocess.run(
        [*asked, "--dir", str(place), "--json", str(found)], cwd=root, env=environment, check=False
    )
    rows = json.loads(found.read_bytes())["rows"]
    found.unlink()
    row = next(row for row in rows if row["job"] == "onnx")
    return {name: round(row[name], 3) for name in ("seconds", "times_cp")}


def medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The median of each figure, and all rounds."""
    names = rounds[0].keys()
    found = {name: round(statistics.median(row[name] for row in rounds), 3) for name in names}
    return {**found, "rounds": list(rounds)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print how long each version takes, and the ratio."""
    made = parser(__doc__, writes=True)
    made.add_argument("commit", help="the earlier version")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--only", choices=("planning", "onnx"), help="leave out the other")
    options = made.parse_args(arguments)
    here = Path(sys.executable)
    demo_model()
    with scratch(options) as temporary:
        place = temporary.resolve()
        earlier = install(options.commit, place)
        there = earlier / ".venv/bin/python"
        ways: dict[str, tuple[Path, Path, Sequence[str]]] = {
            "before": (there, earlier, ()),
            "now": (here, _ROOT, ()),
            "now, without answers": (here, _ROOT, ("--answer-tokens", "0")),
        }
        plans: dict[str, list[dict[str, float]]] = defaultdict(list)
        graphs: dict[str, list[dict[str, float]]] = defaultdict(list)
        for _ in range(options.rounds if options.only != "onnx" else 0):
            for name, (python, root, more) in ways.items():
                plans[name].append(planning(python, root, place / "cache", *more))
        for _ in range(options.rounds if options.only != "planning" else 0):
            graphs["before"].append(onnx(there, earlier, _EARLIER_CAMPAIGNS, place))
            graphs["now"].append(onnx(here, _ROOT, "spp_campaigns", place))
        subprocess.run(
            ["git", "-C", str(_ROOT), "worktree", "remove", "--force", str(earlier)], check=True
        )
    planned = {name: medians(rounds) for name, rounds in plans.items()}
    written = {name: medians(rounds) for name, rounds in graphs.items()}
    lines = [
        f"{what}, {name}: {row['seconds']:.1f} s, "
        f"{row['seconds'] / rows['before']['seconds']:.2f} times as long as before"
        for what, rows in (("cold planning", planned), ("ONNX of 1 GB", written))
        for name, row in rows.items()
    ]
    document = {"machine": machine(), "before": options.commit, "planning": planned}
    finish(options, {**document, "onnx": written}, *lines)


if __name__ == "__main__":
    main()

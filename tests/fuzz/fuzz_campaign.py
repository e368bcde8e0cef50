"""Damaged inputs by the thousand, each judged, and what became of them counted.

    python tests/fuzz/fuzz_campaign.py --inputs 25000

An input is made from the seed, its target's name and its number alone:
`--target header --only 17` makes one of them again, and `--save DIR` keeps what is found.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from fuzz_seeds import CORPUS
from fuzz_targets import TARGETS, Target, check_line, mutation_of

from spp_export.common.errors import SppError

SECONDS_PER_INPUT = 5.0
STUCK_SECONDS = 120.0
# Beyond what the process holds when all readers have run once.
MEMORY_BYTES = 1 << 30


class HangError(BaseException):
    """An input took too long. No Exception, so that no reader can take it for its own."""


@dataclass(frozen=True)
class Finding:
    """An input that ended in anything but success or one line, and how."""

    target: str
    number: int
    entry: str
    file: str
    data: bytes
    problem: str

    def __str__(self) -> str:
        return f"{self.target} {self.number} ({self.entry}/{self.file}): {self.problem}"


@dataclass
class Tally:
    """What became of a target's inputs: counts by outcome, the slowest one, the findings."""

    target: str
    outcomes: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    findings: list[Finding] = field(default_factory=list)

    @property
    def inputs(self) -> int:
        """How many were tried."""
        return sum(self.outcomes.values())


class Bench:
    """A target's entries, copied to where they can be damaged."""

    def __init__(self, target: Target, root: Path) -> None:
        self.target = target
        self.root = root / target.name
        shutil.copytree(CORPUS / target.name, self.root)
        self.victims = [
            (entry, name)
            for entry in sorted(self.root.iterdir())
            for name in target.victims
            if (entry / name).exists()
        ]
        self.seeds = {(entry, name): (entry / name).read_bytes() for entry, name in self.victims}
        self.files = self._files()

    def try_input(self, seed: int, number: int, tally: Tally) -> None:
        """Make an input, read it, note what became of it, and put the entry back in order."""
        rng = Random(f"{seed}/{self.target.name}/{number}")
        entry, name = rng.choice(self.victims)
        data = self._damaged(rng, entry, name)
        (entry / name).write_bytes(data)
        start = time.perf_counter()
        outcome, problem = judge(self.target, entry, name)
        tally.slowest = max(tally.slowest, time.perf_counter() - start)
        (entry / name).write_bytes(self.seeds[entry, name])
        if self._files() != self.files:
            problem = problem or "left other files behind"
        tally.outcomes[outcome if not problem else "FOUND"] += 1
        if problem:
            found = Finding(self.target.name, number, entry.name, name, data, problem)
            tally.findings.append(found)

    def _damaged(self, rng: Random, entry: Path, name: str) -> bytes:
        data = self.seeds[entry, name]
        others = [seed for (_, file), seed in self.seeds.items() if file == name]
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            data = mutation_of(name)(rng, data, others)
        return data

    def _files(self) -> set[str]:
        return {os.path.join(at, name) for at, _, names in os.walk(self.root) for name in names}


def judge(target: Target, entry: Path, name: str) -> tuple[str, str]:
    """("success" or the refusal's class, ""), or ("", what is wrong with how it ended)."""
    try:
        with alarm(SECONDS_PER_INPUT):
            target.read(entry, name)
    except target.refusal as error:
        try:
            check_line(str(error))
        except AssertionError as problem:
            return "", f"{type(error).__name__}: {problem}"
        return type(error).__name__, ""
    except SppError as error:
        return "", f"{type(error).__name__}, expected {target.refusal.__name__}: {error}"
    except (Exception, HangError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        return "", f"{type(error).__name__} at {where}: {str(error)[:300]}"
    return "success", ""


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """HangError inside after so many seconds of the processor's time, which no other load uses."""

    def ring(*_: object) -> None:
        raise HangError(f"took more than {seconds:g} s")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def campaign(
    inputs: int,
    seed: int = 0,
    names: Sequence[str] = (),
    only: int | None = None,
    alone: bool = False,
) -> list[Tally]:
    """Try `inputs` or a few more, shared among targets by their weight.

    alone   in a process of its own, whose memory is limited and which ends where it is stuck
    """
    targets = [TARGETS[name] for name in names or TARGETS]
    total = sum(target.weight for target in targets)
    with tempfile.TemporaryDirectory(prefix="spp-fuzz-") as folder:
        benches = [Bench(target, Path(folder)) for target in targets]
        tallies = [Tally(target.name) for target in targets]
        for bench in benches:
            for entry, name in bench.victims:
                outcome = judge(bench.target, entry, name)
                assert outcome == ("success", ""), f"the seed {entry.name}/{name}: {outcome}"
        if alone:
            _limit_memory(MEMORY_BYTES)
        opened = _open_files()
        for bench, tally in zip(benches, tallies, strict=True):
            count = -(-inputs * bench.target.weight // total)
            for number in range(count) if only is None else (only,):
                if alone:  # the last words of a process that is stuck in a library
                    faulthandler.dump_traceback_later(STUCK_SECONDS, exit=True)
                bench.try_input(seed, number, tally)
        faulthandler.cancel_dump_traceback_later()
        gc.collect()
        assert _open_files() <= opened, "files are left open"
    return tallies


def _limit_memory(more: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    now = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more, resource.RLIM_INFINITY))


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def table(tallies: Sequence[Tally]) -> str:
    """A line per target: inputs, successes, refusals by class, findings and the slowest input."""
    lines = []
    for tally in tallies:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(tally.outcomes.items()))
        slowest = 1000 * tally.slowest
        lines.append(f"{tally.target:18}{tally.inputs:7}  slowest {slowest:6.1f} ms  {counts}")
    found = sum(len(tally.findings) for tally in tallies)
    total = sum(tally.inputs for tally in tallies)
    return "\n".join([*lines, f"{'all':18}{total:7}  findings {found}"])


def save(findings: Sequence[Finding], folder: Path) -> None:
    """Each finding's file, under the target's name and the input's number."""
    for finding in findings:
        place = folder / finding.target / f"{finding.entry}-{finding.number}"
        place.mkdir(parents=True, exist_ok=True)
        (place / finding.file).write_bytes(finding.data)


def main() -> int:
    """Run a campaign as the arguments say; 1 where something was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--inputs", type=int, default=25_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), default=[])
    parser.add_argument("--only", type=int, help="the number of one input")
    parser.add_argument("--save", type=Path, help="directory for what is found")
    options: Any = parser.parse_args()
    warnings.simplefilter("error")
    faulthandler.enable()
    tallies = campaign(options.inputs, options.seed, options.target, options.only, alone=True)
    findings = [finding for tally in tallies for finding in tally.findings]
    print(table(tallies))
    for finding in findings[:50]:
        print(finding)
    if options.save:
        save(findings, options.save)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())

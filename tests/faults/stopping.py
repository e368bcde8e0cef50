"""Exports that are killed, interrupted or terminated at random moments and steps."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

from tally import Tally, one_line, succeeded
from workbench import FORMATS, NEW_KEEP, Workbench, promise
from zygote import Child, Ended, Faults, run, start

_STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
_LINE = {
    signal.SIGINT: "interrupted.",
    signal.SIGTERM: "terminated.",
    signal.SIGHUP: "terminated.",
}
_NAMES = {
    signal.SIGKILL: "kill -9",
    signal.SIGINT: "SIGINT",
    signal.SIGTERM: "SIGTERM",
    signal.SIGHUP: "SIGHUP",
}
# Every second step of a stopped export is one of these last ones, where it is published.
_LAST = 40
_VERIFIED_ONE_IN = 20


def stop(bench: Workbench, tally: Tally, rng: random.Random, number: int, count: int) -> None:
    """`count` exports stopped by a signal, half of them at moments, half of them at steps."""
    name = _NAMES[signal.Signals(number)]
    every = list(product(FORMATS, (False, True), ("moment", "step")))
    for index in range(count):
        form, older, kind = every[index % len(every)]
        if kind == "moment":
            _at_a_moment(bench, tally, rng, name, form, older, (number,))
        else:
            _at_a_step(bench, tally, rng, name, form, older, (number,))


def interrupt_twice(bench: Workbench, tally: Tally, rng: random.Random, count: int) -> None:
    """Ctrl-C, and once more while what was begun is being taken away."""
    for index, (form, older) in enumerate(list(product(FORMATS, (False, True))) * count):
        if index == count:
            return
        twice = (signal.SIGINT, signal.SIGINT)
        _at_a_moment(bench, tally, rng, "SIGINT twice", form, older, twice)


def kill_without_exchange(bench: Workbench, tally: Tally, rng: random.Random, count: int) -> None:
    """Killed while an older export is replaced by two renames, as where the kernel has no swap."""
    for index in range(count):
        form = FORMATS[index % len(FORMATS)]
        _at_a_step(
            bench, tally, rng, "kill -9, no atomic swap", form, True, (signal.SIGKILL,), swap=False
        )


def kill_other_commands(bench: Workbench, tally: Tally, rng: random.Random, count: int) -> None:
    """`plan -o`, `probe` and `convert`, killed at steps."""
    for index in range(count):
        name = ("plan -o", "probe", "convert")[index % 3]
        with bench.folder() as folder:
            target = folder / "out"
            command = _other_command(bench, name, target)
            key = (name, False, True)
            if key not in bench.steps:
                first = run(command, folder, Faults(step=-1))
                succeeded(first)
                bench.steps[key] = first.steps
                target.unlink() if target.is_file() else None
            else:
                first = None
            if first is not None and target.is_dir():
                target.rename(folder / "done")
            step = rng.randint(1, len(bench.steps[key]))
            with tally.case(f"kill -9, {name}", step=step) as found:
                ended = run(command, folder, Faults(step=step, signals=(signal.SIGKILL,)))
                _stopped(ended, signal.SIGKILL)
                found.append("new" if target.exists() else "none")
                succeeded(run([*command, "--force"], folder))
                _nothing_left(folder, {"out", "done"})


def real_command_line(bench: Workbench, tally: Tally, rng: random.Random, count: int) -> None:
    """The `spp` of a fresh process, stopped at moments after its own modules are imported."""
    numbers = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
    with bench.folder() as folder:
        began = time.monotonic()
        succeeded(_end(_fresh(bench.export("onnx", folder / "out"))))
        seconds = time.monotonic() - began
    for index in range(count):
        number, form = numbers[index % 3], FORMATS[index // 3 % 2]
        with bench.folder() as folder:
            older, target = index % 2 == 0, folder / "out"
            if older:
                bench.put_older(form, target)
            command = bench.export(form, target, force=older)
            moment = rng.uniform(0.2, 1.0) * seconds
            with tally.case("a fresh process stopped", number=number, moment=moment) as found:
                process = _fresh(command)
                time.sleep(moment)
                process.send_signal(number)
                _stopped(_end(process), number)
                _after(bench, found, form, older, target, 0)
                succeeded(_end(_fresh(bench.export(form, target, force=True))))
                _nothing_left(folder, {"out"})


def _at_a_moment(
    bench: Workbench,
    tally: Tally,
    rng: random.Random,
    name: str,
    form: str,
    older: bool,
    numbers: tuple[int, ...],
) -> None:
    moments = [rng.uniform(0, 1.05 * _seconds(bench, form))]
    moments += [rng.uniform(0, 0.01) for _ in numbers[1:]]
    with bench.folder() as folder:
        target = folder / "out"
        if older:
            bench.put_older(form, target)
        command = bench.export(form, target, force=older)
        with tally.case(name, form=form, older=older, moments=moments) as found:
            child = start(command, folder)
            ended = _signal_at(child, numbers, moments)
            _stopped(ended, numbers[0], twice=len(numbers) > 1)
            if numbers[0] != signal.SIGKILL and len(numbers) == 1:
                _nothing_left(folder, {"out"})
            _after(bench, found, form, older, target, ended.status == 0)
            _next_run(bench, rng, form, folder)


def _at_a_step(
    bench: Workbench,
    tally: Tally,
    rng: random.Random,
    name: str,
    form: str,
    older: bool,
    numbers: tuple[int, ...],
    swap: bool = True,
) -> None:
    steps = bench.count_steps(form, older, swap)
    first = 1 if rng.random() < 0.3 else max(1, len(steps) - _LAST)
    step = rng.randint(first, len(steps))
    with bench.folder() as folder:
        target = folder / "out"
        if older:
            bench.put_older(form, target)
        command = bench.export(form, target, force=older)
        facts = {"form": form, "older": older, "step": step, "event": steps[step - 1]}
        with tally.case(name, **facts) as found:
            faults = Faults(step=step, signals=numbers, swap=swap)
            ended = run(command, folder, faults)
            _stopped(ended, numbers[0])
            if swap:
                _after(bench, found, form, older, target, ended.status == 0)
                _next_run(bench, rng, form, folder)
            else:
                # The next run, which asks for no replacement, finds one that is whole.
                one_line(run(bench.export(form, target), folder), 2, "is not empty")
                _after(bench, found, form, older, target, False)
                _nothing_left(folder, {"out"})


def _after(
    bench: Workbench, found: list[str], form: str, older: bool, target: Path, done: bool
) -> None:
    state = bench.state(form, target)
    if older:
        promise(state != "none", "the older export is gone")
    else:
        promise(state != "older", "an older export came from nowhere")
    promise(not done or state == "new", "it reported success and published nothing")
    found.append(state)


def _next_run(bench: Workbench, rng: random.Random, form: str, folder: Path) -> None:
    """The same export once more comes out whole and leaves nothing beside it."""
    target = folder / "out"
    succeeded(run(bench.export(form, target, force=True), folder))
    promise(bench.state(form, target) == "new", "the next run did not publish")
    _nothing_left(folder, {"out"})
    if rng.randrange(_VERIFIED_ONE_IN) == 0:
        bench.verify(target)


def _nothing_left(folder: Path, expected: set[str]) -> None:
    left = {path.name for path in folder.iterdir()} - expected
    promise(not left, f"left behind: {sorted(left)}")


def _stopped(ended: Ended, number: int, twice: bool = False) -> None:
    """It ended by the signal, or had ended before."""
    if ended.status == 0:
        succeeded(ended)
    elif number == signal.SIGKILL:
        promise(ended.status == -9, f"killed, it ended with {ended.status}: {ended.err[-2000:]}")
    elif twice:
        # The second one can come while the first is reported.
        promise(ended.status == 130, f"interrupted twice, it ended with {ended.status}")
        said = set(ended.err.splitlines())
        promise(said == {"error: interrupted."}, f"interrupted twice, it said {said}")
    else:
        one_line(ended, _STATUS[signal.Signals(number)], _LINE[signal.Signals(number)])


def _signal_at(child: Child, numbers: tuple[int, ...], moments: list[float]) -> Ended:
    for number, seconds in zip(numbers, moments, strict=True):
        time.sleep(seconds)
        child.signal(number)
    return child.wait()


_SECONDS: dict[str, float] = {}


def _seconds(bench: Workbench, form: str) -> float:
    """How long an export takes that nothing disturbs."""
    if form not in _SECONDS:
        with bench.folder() as folder:
            child = start(bench.export(form, folder / "out"), folder)
            succeeded(child.wait())
            _SECONDS[form] = time.monotonic() - child.started
    return _SECONDS[form]


def _other_command(bench: Workbench, name: str, target: Path) -> list[str | Path]:
    model: list[str | Path] = ["--model", bench.dense]
    if name == "plan -o":
        scenario = ["--scenario", bench.workshop.scenario, "--artifacts", bench.artifacts]
        return ["plan", "--quiet", *scenario, *model, "-o", target]
    if name == "probe":
        return ["probe", "--quiet", "--pools", bench.workshop.pools, *model, "-o", target]
    return ["convert", "--quiet", bench.reference("safetensors", NEW_KEEP), "-o", target]


def _fresh(command: list[str | Path]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "spp_cli.main", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def _end(process: subprocess.Popen[str]) -> Ended:
    out, err = process.communicate()
    return Ended(process.returncode, out, err)

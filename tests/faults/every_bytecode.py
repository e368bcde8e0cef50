"""A signal at every bytecode of taking and giving back: nothing is left behind.

    python tests/faults/every_bytecode.py [--stride N]

Traces an action, and has a signal's handler run after the first, the second, ... bytecode of it,
until one run ends undisturbed; then with a second signal some bytecodes after the first. After each
run the folder must be empty, or hold the whole output, and nothing may wait to be cleared.
`--stride` tries every Nth bytecode in the standard library's code; in our own every one is tried.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from spp_export.common.disk import publish_file, scratch_folder, working_place
from spp_export.common.publish import publish
from spp_export.common.signals import SIGNALS, Cleanup, held

OURS = str(Path(__file__).resolve().parents[2] / "spp_export")
# Bytecodes between a signal and a second one.
GAPS = (1, 3, 10, 40)


class Told(BaseException):
    """What a signal's handler raises, as the command line's does."""


class Strikes:
    """Traces an action, and has the handler of `number` run after the bytecodes `at`.

    Bytecodes are counted: every one in our own code, every `stride`th elsewhere.
    """

    def __init__(self, number: int, at: tuple[int, ...], stride: int) -> None:
        self.number, self.at, self.stride = number, at, stride
        self.count = self.elsewhere = self.struck = 0

    def run(self, action: Callable[[Path], None], folder: Path) -> None:
        """What the handler raises ends here."""
        sys.settrace(self._trace)
        try:
            action(folder)
        except Told:
            pass
        finally:
            sys.setprofile(None)  # first, for it would resume
            sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        """Of a frame that begins: what is called at each bytecode of it."""
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._of_ours if frame.f_code.co_filename.startswith(OURS) else self._of_others

    def _of_ours(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "opcode":
            self._counted(frame)
        return self._of_ours

    def _of_others(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "opcode":
            self.elsewhere += 1
            if self.elsewhere % self.stride == 0:
                self._counted(frame)
        return self._of_others

    def _counted(self, frame: FrameType) -> None:
        self.count += 1
        if self.count in self.at:
            self.struck += 1
            # Nothing is left to count after the last.
            sys.setprofile(self._resume if self.struck < len(self.at) else None)
            sys.settrace(self._trace if self.struck < len(self.at) else None)
            handler = signal.getsignal(self.number)
            assert callable(handler)
            handler(self.number, frame)  # what this raises, the traced code raises

    def _resume(self, frame: FrameType | None, event: str, _: Any) -> None:
        """Python stops tracing where a trace function raises; the next call or return resumes."""
        if sys.gettrace() is None:
            sys.settrace(self._trace)
            while frame is not None and frame.f_code is not Strikes.run.__code__:
                frame.f_trace = self._trace(frame, "call", None)
                frame = frame.f_back


def take_a_place(folder: Path) -> None:
    with working_place(folder / "out") as place:
        (place / "new").write_text("half")


def publish_a_directory(folder: Path) -> None:
    with publish(folder / "deep" / "out") as work:
        (work / "weights").write_text("all")


def publish_a_file(folder: Path) -> None:
    publish_file(folder / "plan.json", "all", force=True)


def take_a_scratch_folder(folder: Path) -> None:
    with scratch_folder(folder) as place:
        (place / "half").write_text("half")


# What may be there afterwards.
ACTIONS = {
    take_a_place: set(),
    publish_a_directory: {"deep", "deep/out", "deep/out/weights"},
    publish_a_file: {"plan.json"},
    take_a_scratch_folder: set(),
}


def tell(number: int, _: Any) -> None:
    raise Told(number)


def everything_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def campaign(
    signals: Sequence[signal.Signals], gaps: Sequence[int], stride: int, step: int
) -> list[str]:
    """What was wrong, with every `step`th bytecode of those counted; the number of runs last."""
    runs, problems = 0, []
    sys.unraisablehook = lambda _: None  # what is raised while an object goes
    os.fsync = os.fstat  # type: ignore[assignment]  # nothing here waits for a disk
    for action, whole in ACTIONS.items():
        for number in signals:
            before = signal.signal(number, tell)
            for gap in (0, *gaps):
                first = 1 - step
                while True:
                    first += step
                    strikes = Strikes(number, (first, first + gap) if gap else (first,), stride)
                    with tempfile.TemporaryDirectory() as name:
                        strikes.run(action, Path(name))
                        if gap:  # after two signals it may take until the process ends
                            Cleanup._run_all()
                        left = everything_in(Path(name))
                    runs += 1
                    where = f"{action.__name__}, {number.name}, bytecode {first}, gap {gap}"
                    if left not in (set(), whole):
                        problems.append(f"{where}: left behind {sorted(left)}")
                    if Cleanup._pending or held.depth or held.waiting:
                        problems.append(
                            f"{where}: {len(Cleanup._pending)} to clear, held {held.depth}, "
                            f"{held.waiting} waiting"
                        )
                        Cleanup._run_all()
                        held.depth, held.waiting = 0, []
                    if not strikes.struck:
                        break
            signal.signal(number, before)
    return [*problems, f"{runs} runs, {len(problems)} broken"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stride", type=int, default=200)
    parser.add_argument("--small", action="store_true", help="one signal, and few bytecodes")
    options = parser.parse_args()
    signals = SIGNALS[1:2] if options.small else SIGNALS
    gaps, step = (GAPS[1:2], 4) if options.small else (GAPS, 1)
    *problems, counts = campaign(signals, gaps, options.stride, step)
    print("\n".join([*problems, counts]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

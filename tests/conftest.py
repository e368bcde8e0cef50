"""Settings that hold for every test: no network, no trace outside pytest's own directories, and a
guard against deadlock in place of every limit of time."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from types import FrameType, SimpleNamespace

import pytest
from pairs import chosen

# No slow machine takes this long for a test; no test has a limit of its own.
_DEADLOCK_MINUTES = 15

# transformers copies a checkpoint's own code here before it runs it, and reads the variables once,
# when it is first imported.
_MODULES = tempfile.mkdtemp(prefix="spp-tests-")
os.environ["HF_MODULES_CACHE"] = _MODULES
os.environ["HF_HUB_OFFLINE"] = "1"
# What a slow machine takes long for must not change what a command writes.
os.environ.setdefault("SPP_PROGRESS_SECONDS", "0")
# Tiny matrices are slower on several threads, and round by their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell in the background ignores these, and so would every process that tests start and signal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Without a card the Triton kernels run in triton's interpreter, which is chosen at its import.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


_NO_ROW = SimpleNamespace(params={})

# Conversations of those that come with spp. A tiny model's quality on all of them takes longer than
# the rest of its conversion.
_FEW = 4


def _deadlock(number: int, frame: FrameType | None) -> None:
    pytest.fail(
        f"no end after {_DEADLOCK_MINUTES} minutes: a deadlock or a hang, not a slow machine."
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a test that hangs; slow ones repeat something at length, and may take as long."""
    if item.get_closest_marker("slow"):
        return (yield)
    before = signal.signal(signal.SIGALRM, _deadlock)
    signal.alarm(60 * _DEADLOCK_MINUTES)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The default model's tests first: spread over processes, one of them sets it up alone. Rows
    that a file thins out are slow."""
    items.sort(key=lambda item: item.get_closest_marker("demo") is None)
    rows: dict[tuple[Path, str], list[pytest.Function]] = {}
    for item in items:
        if item.get_closest_marker("thinned") and not item.get_closest_marker("slow"):
            assert isinstance(item, pytest.Function)
            rows.setdefault((item.path, item.originalname), []).append(item)
    for of_test in rows.values():
        marker = of_test[0].get_closest_marker("thinned")
        assert marker
        kept = chosen([_values(item) for item in of_test], lambda row: row, **marker.kwargs)
        for index, item in enumerate(of_test):
            if index not in kept:
                item.add_marker(pytest.mark.slow)


def _values(item: pytest.Function) -> set[str]:
    """What a row has: the value of every parameter, that of every field of one, and the family of a
    case that is given by its name."""
    from factories import CASES  # torch, which reads the variables above when it is imported

    family = {case.name: case.family for case in CASES}
    values = {"a row"}
    for name, value in getattr(item, "callspec", _NO_ROW).params.items():
        values.add(f"{name} {value!r}")
        parts = vars(value).items() if is_dataclass(value) else [(name, value)]
        values |= {f"{part} {of_part!r}" for part, of_part in parts}
        for _, word in parts:
            if isinstance(word, str):
                values |= {family[case] for case in word.split() if case in family}
    return values


def pytest_collection_finish() -> None:
    """What is there by now stays: thousands of tests and modules that no collection need visit."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def few_conversations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """Measure on some of the conversations that come with spp; `all_conversations` has the rest."""
    from spp_export.commands import quality

    lines = quality._CONVERSATIONS.read_text(encoding="utf-8").splitlines(keepends=True)
    few = tmp_path_factory.mktemp("conversations") / quality._CONVERSATIONS.name
    few.write_text("".join(lines[:_FEW]), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "_CONVERSATIONS", few)
        yield patch


@pytest.fixture
def all_conversations(few_conversations: pytest.MonkeyPatch) -> Iterator[None]:
    """Measure on all of them, as users do."""
    from spp_export.commands import quality

    few = quality._CONVERSATIONS
    few_conversations.undo()
    yield
    few_conversations.setattr(quality, "_CONVERSATIONS", few)


@pytest.fixture(scope="session", autouse=True)
def every_processor() -> Iterator[None]:
    """Whatever this one has: what nobody asks to be in bfloat16 is in float32, as the oracles."""
    from spp_export.models import session

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "multiplies_bfloat16", lambda device: False)
        yield


def pytest_unconfigure(config: pytest.Config) -> None:
    gc.unfreeze()  # some libraries complain of what is left at the end
    shutil.rmtree(_MODULES, ignore_errors=True)

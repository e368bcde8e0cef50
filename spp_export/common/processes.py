"""Several processes of one command, as torchrun starts them on the cards of one or more machines.

Rank 0 runs the command, and alone reads caches, prints and publishes. The other ranks wait to be
asked (`ask`): every rank then calls the same function, works on its share of the same list
(`share`), and what they have summed is added at rank 0 (`add`). What is sent is JSON and arrays;
nothing is pickled.

Only the `spp` command takes part (`begin`). Elsewhere, and without torchrun, each of these does
nothing, and torch is not imported.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from spp_export.common import errors
from spp_export.common.errors import ProcessError, SppError, UsageError, reason_of
from spp_export.common.options import parse_duration

if TYPE_CHECKING:
    from torch import Tensor

TIMEOUT_VARIABLE = "SPP_TIMEOUT"
_DEFAULT_TIMEOUT = "30m"
# Ranks wait to be asked for as long as the first one writes and checks models.
_PATIENCE = timedelta(days=100)
_LOOK_S = 0.05
# How long a rank that ends by itself may take to say so, once others have seen it go.
_GRACE_S = 3.0
_START, _AT, _END = "spp/start", "spp/at", "spp/end"
_ARRAY, _TENSOR = "\0array", "\0tensor"

Item = TypeVar("Item")
Called = TypeVar("Called", bound=Callable[..., None])


@dataclass
class _Process:
    """This process among `size`; `local_size` of them, this one in place `local_rank`, are on its
    machine.

    control: the group in which ranks are asked; None until the first time
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    store: Any = None
    control: Any = None


_here = _Process()
_answering: dict[str, Callable[..., None]] = {}


def begin() -> bool:
    """Take the rank that the environment gives this process, as torchrun sets it; whether it is one
    that works for rank 0. Raises UsageError for an environment that makes no sense, ProcessError
    where the ranks do not meet."""
    names = ("WORLD_SIZE", "RANK", "MASTER_ADDR")
    if any(name not in os.environ for name in names):
        return False
    try:
        _here.size, _here.rank = (int(os.environ[name]) for name in names[:2])
        _here.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        _here.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    except ValueError as error:
        raise UsageError(
            f"WORLD_SIZE, RANK, LOCAL_WORLD_SIZE and LOCAL_RANK must be whole numbers ({error}). "
            "Unset them, or start with torchrun."
        ) from error
    if _here.size > 1:
        _open_store()
    return _here.rank > 0


def count() -> int:
    """How many processes there are."""
    return _here.size


def local_place() -> tuple[int, int]:
    """This process's place among those of its machine, and how many these are."""
    return _here.local_rank, _here.local_size


def rank() -> int:
    """This process's rank."""
    return _here.rank


def lone_environment() -> dict[str, str]:
    """The environment of a child that is no rank, though this process may be one."""
    own = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    kept = {name: value for name, value in os.environ.items() if name not in own}
    return {name: value for name, value in kept.items() if not name.startswith("TORCHELASTIC_")}


def answering(function: Called) -> Called:
    """Let other ranks be asked for a function of this package."""
    _answering[_name(function)] = function
    return function


def ask(function: Callable[..., None], **arguments: Any) -> None:
    """Have every other rank call a function that is `answering`. Arguments are what JSON knows, and
    arrays and tensors in it.

    What it raises there is raised here, by whatever waits for that rank next.
    """
    if _here.size == 1 or _here.rank:
        return
    import torch

    _join()
    message = _packed({"function": _name(function), "arguments": arguments})
    _broadcast(torch.tensor([len(message), 0]))
    _broadcast(torch.frombuffer(bytearray(message), dtype=torch.uint8))


def share(items: Sequence[Item]) -> Sequence[Item]:
    """This rank's part of a list that every rank has."""
    return items[_here.rank :: _here.size]


def add(tensors: Iterable[Tensor]) -> None:
    """Give rank 0 the sum over all ranks of each tensor, in place; others lose their values.

    Every rank adds tensors of the same shapes and dtypes in the same order.
    """
    if _here.size == 1:
        return
    import torch.distributed as dist

    moved = [(tensor, tensor.to(_meeting_place())) for tensor in tensors]
    with _Together():
        works = [dist.reduce(there, 0, async_op=True) for _, there in moved]
        for work in works:
            _wait(work)
    for tensor, there in moved:
        if tensor is not there:
            tensor.copy_(there)


def whole(part: Tensor) -> Tensor:
    """What every rank has a part of, joined in their order along the last axis.

    The parts have one shape; every rank calls this at once.
    """
    import torch
    import torch.distributed as dist

    part = part.contiguous()
    parts = [torch.empty_like(part) for _ in range(_here.size)]
    with _Together():
        _wait(dist.all_gather(parts, part, async_op=True))
    return torch.cat(parts, dim=-1)


def work(explain: Callable[[Exception], tuple[str, int]]) -> int:
    """Do what rank 0 asks until it ends; the exit status. `explain` gives what a user reads of an
    error, which rank 0 says, and its exit status."""
    logging.getLogger("spp_export").addHandler(logging.NullHandler())
    logging.getLogger("spp_export").propagate = False
    try:
        status = _answer()
    except _LostError:
        status = 1
    except Exception as error:
        message, status = explain(error)
        kind = type(error).__name__ if isinstance(error, SppError) else SppError.__name__
        _say(error=kind, message=message)
    else:
        _say(status=status)
        return status
    if lost := failure():
        raise lost
    return status


def finish(status: int) -> None:
    """Rank 0 is done, by this exit status: the others end by the same.

    What torchrun sends it when it sees them end, SIGTERM, is no news.
    """
    if _here.size == 1 or _here.rank:
        return
    _ignore_termination()
    with suppress(Exception):  # then torchrun ends them
        _say(status=status)
        if _here.control is None:
            _here.store.set(_START, str(status))
        elif status:  # they may be in the middle of something, and see the connection close
            return
        else:
            import torch

            _broadcast(torch.tensor([0, status]))
        # Where no agent of torchrun keeps the words, they go with this process.
        until = time.monotonic() + _GRACE_S
        while time.monotonic() < until and not all(map(_word_of, range(_here.size))):
            time.sleep(_LOOK_S)


def say_terminated() -> None:
    """Tell the others that a signal ends this process, and nothing that went wrong in it."""
    _say(signal=True)


def failure(reason: str = "") -> SppError | None:
    """Why the command cannot go on: what another rank has met, or that it is gone without a word.

    None where ranks were only told to end, and where a rank before this one is there to say it.
    `reason` is of a connection that failed, which is then the last thing to name. From here on
    SIGTERM, by which torchrun ends what is left, is ignored.
    """
    if _here.store is None or _someone_before():
        return None
    _ignore_termination()
    others = [rank for rank in range(_here.size) if rank != _here.rank]
    until = time.monotonic() + _GRACE_S
    while True:
        for other in others:
            dead = _is_dead(other)
            word = _word_of(other)
            if word and "error" in word:
                kind = getattr(errors, word["error"], SppError)
                error: SppError = kind(f"{_called(other)}: {word['message']}")
                return error
            if dead and word is None:
                return ProcessError(
                    f"{_called(other)} was killed, perhaps for want of memory, and the command "
                    "ended with it. Nothing was published. Start fewer processes, or look for the "
                    "reason in the machine's log."
                )
        silent = [other for other in others if _word_of(other) is None]
        if not silent or time.monotonic() > until:
            break
        time.sleep(_LOOK_S)
    if not reason:
        return None
    named = _called(silent[0]) if silent else "another rank"
    if "imed out" in reason:
        return ProcessError(
            f"{named} did not answer within {_timeout_text()}. Nothing was published. Where work "
            f"takes longer, set {TIMEOUT_VARIABLE} to a duration such as 2h."
        )
    return ProcessError(
        f"the connection to {named} is lost ({reason:.120}). Nothing was published. Look for the "
        "reason in that machine's log."
    )


def _ignore_termination() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _LostError(Exception):
    """The connection to other ranks failed, as seen by one that works for rank 0."""


class _Together:
    """A context in which ranks wait for each other. Raises SppError at rank 0 where one does not
    come, and _LostError at the others."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if not isinstance(error, RuntimeError):
            return
        if _here.rank:
            _say(lost=True)
            raise _LostError from error
        why = failure(reason_of(error))
        assert why is not None
        raise why from error


def _answer() -> int:
    with _Together():
        while not _here.store.check([_START]):
            time.sleep(_LOOK_S)
        if status := _here.store.get(_START):
            return int(status)
    import torch

    _join()
    while True:
        size, status = _broadcast(torch.zeros(2, dtype=torch.long)).tolist()
        if not size:
            return int(status)
        message = _unpacked(_broadcast(torch.zeros(size, dtype=torch.uint8)).numpy().tobytes())
        import_module(message["function"].partition(":")[0])
        _answering[message["function"]](**message["arguments"])


def _name(function: Callable[..., None]) -> str:
    return f"{function.__module__}:{function.__qualname__}"


def _open_store() -> None:
    """Meet the other ranks where the environment says, to leave words for each other."""
    from torch.distributed.rendezvous import rendezvous

    try:
        _here.store, _, _ = next(rendezvous("env://", timeout=_timeout()))
        _here.store.set(f"{_AT}/{_here.rank}", f"{os.uname().nodename} {os.getpid()}")
    except (RuntimeError, OSError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT')}"
        raise ProcessError(
            f"{_here.size} processes were to meet at {place} ({reason_of(error):.120}). Start them "
            "with torchrun, or unset WORLD_SIZE for a command of one process."
        ) from error


def _join() -> None:
    """Connect all ranks."""
    if _here.control is not None:
        return
    import torch
    import torch.distributed as dist

    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    own_cards = 0 < _here.local_size <= cards
    if own_cards:
        torch.cuda.set_device(_here.local_rank)
    with _Together():
        if not _here.rank:
            _here.store.set(_START, "")
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if own_cards else "gloo",
            store=_here.store,
            rank=_here.rank,
            world_size=_here.size,
            timeout=_timeout(),
        )
        _here.control = dist.new_group(backend="gloo", timeout=_PATIENCE)


def _meeting_place() -> str:
    """The device whose tensors are added: a card of this process's own, where there is one."""
    import torch.distributed as dist

    return f"cuda:{_here.local_rank}" if "nccl" in dist.get_backend_config() else "cpu"


def _broadcast(tensor: Tensor) -> Tensor:
    import torch.distributed as dist

    with _Together():
        _wait(dist.broadcast(tensor, 0, group=_here.control, async_op=True))
    return tensor


def _wait(work: Any) -> None:
    """Wait in Python, where signals are heard."""
    pause = 1e-5
    while not work.is_completed():
        time.sleep(pause)
        pause = min(1.5 * pause, _LOOK_S)
    work.wait()


def _say(**word: Any) -> None:
    """Leave a word on how this rank ends."""
    with suppress(Exception):  # nobody is there to read it
        _here.store.set(f"{_END}/{_here.rank}", json.dumps(word))


def _word_of(rank: int) -> dict[str, Any] | None:
    with suppress(Exception):
        if _here.store.check([f"{_END}/{rank}"]):
            word: dict[str, Any] = json.loads(_here.store.get(f"{_END}/{rank}"))
            return word
    return None


def _place_of(rank: int) -> tuple[str, int] | None:
    with suppress(Exception):
        if _here.store.check([f"{_AT}/{rank}"]):
            host, pid = _here.store.get(f"{_AT}/{rank}").decode().split()
            return host, int(pid)
    return None


def _called(rank: int) -> str:
    place = _place_of(rank)
    return f"rank {rank} of {_here.size}" + (f" on {place[0]}" if place else "")


def _is_dead(rank: int) -> bool:
    """Whether a process of this machine has ended; of other machines nobody can tell."""
    import psutil

    place = _place_of(rank)
    if place is None or place[0] != os.uname().nodename:
        return False
    try:
        return bool(psutil.Process(place[1]).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _someone_before() -> bool:
    """Whether a rank before this one says, or has said, what happened."""
    return any(_word_of(rank) or not _is_dead(rank) for rank in range(_here.rank))


def _timeout_text() -> str:
    return os.environ.get(TIMEOUT_VARIABLE) or _DEFAULT_TIMEOUT


def _timeout() -> timedelta:
    try:
        return timedelta(seconds=parse_duration(_timeout_text()))
    except ValueError as error:
        raise UsageError(f"{TIMEOUT_VARIABLE}: {error}.") from error


def _packed(value: Mapping[str, Any]) -> bytes:
    """JSON, its length before it and the arrays in it as safetensors behind it."""
    import numpy as np
    from safetensors.numpy import save

    arrays: dict[str, Any] = {}

    def put(kind: str, array: Any) -> dict[str, str]:
        arrays[name := str(len(arrays))] = np.ascontiguousarray(array)
        return {kind: name}

    def hoisted(part: Any) -> Any:
        if isinstance(part, np.ndarray):
            return put(_ARRAY, part)
        if hasattr(part, "numpy"):
            return put(_TENSOR, part.cpu().numpy())
        if isinstance(part, Mapping):
            return {key: hoisted(inner) for key, inner in part.items()}
        if isinstance(part, (list, tuple)):
            return [hoisted(inner) for inner in part]
        return part

    text = json.dumps(hoisted(value)).encode()
    return len(text).to_bytes(8, "little") + text + save(arrays)


def _unpacked(message: bytes) -> Any:
    import torch
    from safetensors.numpy import load

    end = 8 + int.from_bytes(message[:8], "little")
    arrays = load(message[end:])

    def put_back(part: dict[str, Any]) -> Any:
        if part.keys() == {_ARRAY}:
            return arrays[part[_ARRAY]]
        if part.keys() == {_TENSOR}:
            return torch.from_numpy(arrays[part[_TENSOR]].copy())
        return part

    return json.loads(message[8:end], object_hook=put_back)

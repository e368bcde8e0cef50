"""Makes the items of an iterator on a thread of its own, a bounded number of them ahead."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from queue import SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")


@contextmanager
def ahead(items: Generator[Item], depth: int) -> Iterator[Iterator[Item]]:
    """Yield `items` in order, up to `depth` of them made before they are asked for.

    What making one raises is raised where it would have been taken. On exit, early or not, `items`
    is closed and its thread has ended.
    """
    # An item stands in a tuple of its own, None for the end.
    made: SimpleQueue[tuple[Item] | BaseException | None] = SimpleQueue()
    room = threading.Semaphore(depth)
    stopped = threading.Event()

    def make() -> None:
        try:
            with closing(items):
                for item in items:
                    room.acquire()
                    if stopped.is_set():
                        return
                    made.put((item,))
            made.put(None)
        except BaseException as error:
            made.put(error)

    def take() -> Iterator[Item]:
        while (found := made.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            room.release()
            yield found[0]

    thread = threading.Thread(target=make, name="spp-ahead")
    thread.start()
    try:
        yield take()
    finally:
        stopped.set()
        room.release()
        thread.join()

"""Items made ahead on a thread: their order, how far ahead, and every way to stop."""

from __future__ import annotations

import threading
import time

import pytest

from spp_export.models.checkpoint.writer import ahead


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "spp-ahead"]


def wait_for(condition):
    while not condition():
        time.sleep(0.001)


def test_all_items_in_order():
    with ahead((number for number in range(1000)), 3) as items:
        assert list(items) == list(range(1000))
    assert not threads()


def test_no_more_than_the_depth_and_one_in_the_making():
    made = []

    def make():
        for number in range(20):
            made.append(number)
            yield number

    with ahead(make(), 4) as items:
        wait_for(lambda: len(made) == 5)
        time.sleep(0.02)
        assert len(made) == 5
        assert next(items) == 0
        wait_for(lambda: len(made) == 6)
    assert len(made) <= 7


def test_what_making_raises_comes_after_what_was_made():
    def make():
        yield 1
        raise ValueError("no more")

    with ahead(make(), 4) as items:
        assert next(items) == 1
        with pytest.raises(ValueError, match="no more"):
            next(items)
    assert not threads()


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("taken", [0, 1, 7])
def test_stopping_early_closes_what_makes_them(depth, taken):
    closed = []

    def make():
        try:
            yield from range(100)
        finally:
            closed.append(threading.current_thread().name)

    with pytest.raises(KeyboardInterrupt), ahead(make(), depth) as items:  # noqa: PT012
        for _ in range(taken):
            next(items)
        raise KeyboardInterrupt
    assert closed == ["spp-ahead"]
    assert not threads()

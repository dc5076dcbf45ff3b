"""The prefetch thread: order, faults, pauses, and leaving early."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from des_core.data.feed.prefetch import Pause, ahead


def test_items_come_in_order_and_one_is_made_ahead() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(5):
            made.append(number)
            yield number

    seen = []
    for number in ahead(items()):
        time.sleep(0.05)
        # One waits in the line, one more is in the maker's hands.
        assert len(made) <= number + 3
        seen.append(number)
    assert seen == made == [0, 1, 2, 3, 4]


def test_a_fault_in_making_is_raised_to_the_user() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("row 7 is broken")

    line = ahead(items())
    assert next(line) == 1
    with pytest.raises(ValueError, match="row 7 is broken"):
        next(line)


def test_nothing_after_a_pause_begins_before_its_end() -> None:
    begun: list[str] = []

    def items() -> Iterator[Pause | str]:
        yield Pause()
        begun.append("after")
        yield "item"

    line = ahead(items())
    pause = next(line)
    assert isinstance(pause, Pause)
    time.sleep(0.15)
    assert not begun
    pause.done.set()
    assert next(line) == "item" and begun == ["after"]


def test_leaving_early_ends_the_thread() -> None:
    def items() -> Iterator[Pause | int]:
        yield from range(3)
        yield Pause()

    for taken in range(1, 5):
        line = ahead(items())
        for _ in range(taken):
            next(line)
        line.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_waiting_is_told() -> None:
    def items() -> Iterator[int]:
        time.sleep(0.1)
        yield 1

    waits: list[float] = []
    assert list(ahead(items(), waits.append)) == [1]
    assert sum(waits) > 0.08

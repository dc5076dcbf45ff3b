"""The prefetch threads: order, faults, pauses, and leaving early."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from des_core.data.feed.prefetch import Pause, ahead, in_order


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


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_work_of_several_threads_comes_in_order_and_little_is_held(threads: int) -> None:
    """The first item takes longest; no more begin than threads and the one in use."""
    begun: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        time.sleep(0.05 if number % 3 == 0 else 0.0)
        return number * number

    seen = []
    for square in in_order(work, iter(range(12)), threads):
        seen.append(square)
        assert len(begun) <= len(seen) + threads
    assert seen == [number * number for number in range(12)]


def test_a_fault_of_a_thread_is_raised_in_its_turn() -> None:
    def work(number: int) -> int:
        if number == 2:
            raise ValueError("row group 2 is damaged")
        return number

    line = in_order(work, range(9), 3)
    assert [next(line), next(line)] == [0, 1]
    with pytest.raises(ValueError, match="row group 2 is damaged"):
        next(line)


def test_several_items_may_lie_ready() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(9):
            made.append(number)
            yield number

    line = ahead(items(), depth=4)
    assert next(line) == 0
    for _ in range(100):
        time.sleep(0.01)
        if len(made) == 6:
            break
    # Four wait in the line, and one is in the maker's hands.
    assert made == [0, 1, 2, 3, 4, 5]
    assert list(line) == list(range(1, 9))

"""The next item is made in a thread while the present one is in use.

A ``Pause`` among the items drains the line: nothing after it is begun until the consumer says so. What
changes state that the makers of later items read (evictions), or must not hold anything of them
(checkpoints), happens in a pause.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")
POLL_S = 0.05


@dataclass(frozen=True)
class Pause:
    """Everything before it is done and nothing after it has begun, until ``done`` is set."""

    done: threading.Event = field(default_factory=threading.Event)


def ahead(items: Iterator[T], waited: Callable[[float], None] = lambda seconds: None) -> Generator[T, None, None]:
    """The items in order, the next one in the making; close it to end the thread. What a making raises is raised here.

    Args:
        waited: told the seconds that the consumer waited for an item.
    """
    line: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(maxsize=1)
    left = threading.Event()

    def put(kind: str, item: T | BaseException | None) -> bool:
        while not left.is_set():
            try:
                line.put((kind, item), timeout=POLL_S)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
                while isinstance(item, Pause) and not item.done.wait(POLL_S):
                    if left.is_set():
                        return
            put("end", None)
        except BaseException as error:
            put("error", error)

    thread = threading.Thread(target=make, daemon=True, name="prefetch")
    thread.start()
    try:
        yield from _taken(line, waited)
    finally:
        left.set()
        thread.join()


def _taken(line: queue.Queue[tuple[str, T | BaseException | None]], waited: Callable[[float], None]) -> Iterator[T]:
    while True:
        start = time.perf_counter()
        kind, item = line.get()
        waited(time.perf_counter() - start)
        if kind == "end":
            return
        if kind == "error":
            assert isinstance(item, BaseException)
            raise item
        yield item  # type: ignore[misc]

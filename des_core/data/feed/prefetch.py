"""The next items are made in threads while the present one is in use.

A ``Pause`` among the items drains the line: nothing after it is begun until the consumer says so. What
changes state that the makers of later items read (evictions), or must not hold anything of them
(checkpoints), happens in a pause.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")
S = TypeVar("S")
MOST_THREADS = 8
POLL_S = 0.05


@dataclass(frozen=True)
class Pause:
    """Everything before it is done and nothing after it has begun, until ``done`` is set."""

    done: threading.Event = field(default_factory=threading.Event)


def default_threads() -> int:
    """Threads that keep a GPU fed: half of this process's share of the machine's cores, up to 8."""
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(2, min(MOST_THREADS, cores // 2))


def in_order(work: Callable[[S], T], items: Iterable[S], threads: int) -> Iterator[T]:
    """``work`` of each item, in order, up to ``threads`` of them in the making; one thread is the caller's own.

    No more than ``threads`` results are held beside the one in use. What a work raises is raised in its turn.
    """
    if threads == 1:
        yield from map(work, items)
        return
    made: deque[Future[T]] = deque()
    with ThreadPoolExecutor(threads, "read") as pool:
        try:
            for item in items:
                made.append(pool.submit(work, item))
                if len(made) == threads:
                    yield made.popleft().result()
            while made:
                yield made.popleft().result()
        finally:
            for future in made:
                future.cancel()


def ahead(
    items: Iterator[T], waited: Callable[[float], None] = lambda seconds: None, depth: int = 1
) -> Generator[T, None, None]:
    """The items in order, the next one in the making; close it to end the thread. What a making raises is raised here.

    Args:
        waited: told the seconds that the consumer waited for an item.
        depth: items that may lie ready.
    """
    line: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(maxsize=depth)
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

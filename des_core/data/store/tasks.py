"""Runs tasks by an engine: what was lost is tried again, the first mistake is told, progress is said.

An engine is one function: a context that gives ``Run``. It calls ``attempt`` for each item, anywhere, and yields places
and outcomes as they come; an item whose process or machine died is ``lost``. What it carries is small: the data go
through storage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

from des_core import log
from des_core.config import Config
from des_core.errors import DesError, WorkerError, error_of, of_system

ATTEMPTS = 3
"""How often an item is tried whose process dies."""


@dataclass(frozen=True)
class Outcome:
    """What came of an item: a value, an error by its code, or why its process was lost."""

    value: Any = None
    code: str = ""
    message: str = ""
    lost: str = ""


Item = TypeVar("Item")
Value = TypeVar("Value")
Run = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[tuple[int, Outcome]]]


def engine_of(config: Config) -> AbstractContextManager[Run]:
    """The engine that a config names.

    Raises:
        ConfigError: it is not installed.
        UnavailableError: it does not answer.
    """
    if config.ingest.engine == "ray":
        from des_core.data.store import engine_ray

        return engine_ray.tasks(config.storage.root)
    from des_core.data.store import engine_local

    return engine_local.tasks()


def attempt(call: Callable[[Any], Any], item: Any) -> Outcome:
    """The outcome of one item; errors of this package's own become codes, for not every process may raise them."""
    try:
        return Outcome(value=call(item))
    except DesError as error:
        return Outcome(code=error.code, message=str(error))
    except OSError as error:
        told = of_system(error)
        if told is None:
            raise
        return Outcome(code=told.code, message=str(told))


def run_all(
    run: Run,
    call: Callable[[Item], Value],
    items: Sequence[Item],
    done: Callable[[int, Value], None] | None = None,
) -> list[Value]:
    """The value of each item, in their order.

    Args:
        done: is told a place and its value as they come.

    Raises:
        DesError: of the first item that has one, whichever came first by the clock.
        WorkerError: an item's process died ``ATTEMPTS`` times.
    """
    values: dict[int, Value] = {}
    failed: dict[int, Outcome] = {}
    lost = dict.fromkeys(range(len(items)), 0)
    while lost:
        waiting, attempts, lost = list(lost), lost, {}
        outcomes = run(call, [items[place] for place in waiting])
        for number, outcome in outcomes:
            place = waiting[number]
            if outcome.lost:
                lost[place] = attempts[place] + 1
                _check(str(items[place]), outcome.lost, lost[place])
            elif outcome.code:
                failed[place] = outcome
            else:
                values[place] = outcome.value
                if done:
                    done(place, outcome.value)
            # Items are begun in their order, so those before the first mistake are nearly done.
            if failed and all(earlier in values for earlier in waiting if earlier < min(failed)):
                first = failed[min(failed)]
                raise error_of(first.code, first.message)
        if failed:
            lost = {place: count for place, count in lost.items() if place < min(failed)}
            if not lost:
                first = failed[min(failed)]
                raise error_of(first.code, first.message)
    return [values[place] for place in range(len(items))]


def _check(item: str, why: str, attempts: int) -> None:
    if attempts >= ATTEMPTS:
        raise WorkerError(
            f"{item}: its process died {attempts} times ({why}); is there memory enough? What is done is kept, "
            "start it again"
        )
    log.emit("again", task=item, why=why, attempt=attempts + 1)

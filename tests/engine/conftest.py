"""One group of real worker processes per N and session."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.engine.group import Group


@pytest.fixture(scope="session")
def group() -> Iterator[Callable[[int], Group]]:
    """``group(n)`` is the session's group of n workers, started on first use."""
    groups: dict[int, Group] = {}

    def get(workers: int) -> Group:
        if workers in groups and groups[workers].broken:
            groups.pop(workers).close()
        if workers not in groups:
            groups[workers] = Group(workers)
        return groups[workers]

    yield get
    for started in groups.values():
        started.close()

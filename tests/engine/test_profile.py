"""Phases on a device, by a clock that a test moves: what is read, when, and that nothing waits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from des_core.engine.profile import WATCHED, Mark, Profile


class FakeMark:
    """A point in time that the device reaches later."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock, self.at = clock, clock.now

    def passed(self) -> bool:
        return self._clock.device >= self.at

    def since(self, before: Mark) -> float:
        assert isinstance(before, FakeMark)
        self._clock.waits += not self.passed()
        return self.at - before.at


class FakeClock:
    """A device whose work takes as long as a test says, some steps behind the host."""

    def __init__(self) -> None:
        self.now = self.device = 0.0
        self.waits = self.watching = 0

    def mark(self) -> Mark:
        return FakeMark(self)

    def watch(self) -> Callable[[], tuple[int, int]]:
        self.watching += 1
        return lambda: (44 * len(WATCHED), 0)

    def copy_bytes_per_s(self) -> float:
        return 3e12


def a_step(profile: Profile, clock: FakeClock) -> None:
    """Backward takes 5 s, of which 2 are an exchange; a host's phase is not the device's."""
    with profile.phase("gather"):
        clock.now += 1
    with profile.phase("backward"):
        clock.now += 1
        with profile.exchange():
            clock.now += 2
        clock.now += 2
    profile.count(lambda: torch.tensor(7))
    profile.end_step()


def test_phases_are_read_when_they_have_passed_and_exchanges_are_not_backwards() -> None:
    clock = FakeClock()
    profile = Profile(torch.device("cpu"), lambda: 0.0, clock)
    for step in range(1, WATCHED.stop + 1):
        a_step(profile, clock)
        clock.device = clock.now - 6
        assert clock.waits == 0, "no step waits for the device"
        assert profile.seconds["gather"] == pytest.approx(max(step - 2, 0))
    ms = profile.ms_per_step()
    assert ms["gather"] == pytest.approx(1000) and ms["exchange"] == pytest.approx(2000)
    assert ms["backward"] == pytest.approx(3000)
    told = profile.on_device()
    assert told == {"launches": 44, "synchronisations": 0, "least_bytes": 7, "copy_bytes_per_s": 3e12}
    assert clock.watching == 1
    profile.restart()
    assert profile.ms_per_step()["gather"] == 0


def test_without_a_device_the_host_is_timed_and_nothing_is_told_of_one() -> None:
    spent = [0.0]
    profile = Profile(torch.device("cpu"), lambda: spent[0])
    with profile.phase("backward"), profile.exchange():
        spent[0] = 1e-9
    profile.count(lambda: pytest.fail("counted"))  # type: ignore[arg-type, return-value]
    profile.end_step()
    assert profile.on_device() is None and not profile.detailed
    assert profile.ms_per_step()["exchange"] == pytest.approx(1e-6)

"""A day whose logs cannot be ingested goes to quarantine; other days go on without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from components import finished, stages
from des_core.config import Config, load_config
from des_core.errors import DataError, UserError
from des_core.recurring import daily

TOML = """
[run]
name = "shop"

[source]
path = "{day}.csv"
label = "click"
time = "at"

[split]
by = "time"

[[fields]]
name = "user"
"""
DAYS = ("2026-01-01", "2026-01-02", "2026-01-03")


def write(folder: Path, day: str) -> None:
    rows = "".join(f"{n % 2},u{n % 7},{day}T{n % 24:02d}:00:00\n" for n in range(240))
    (folder / f"{day}.csv").write_text("click,user,at\n" + rows)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "shop.toml").write_text(TOML)
    for day in DAYS:
        write(tmp_path, day)
    return load_config(tmp_path / "shop.toml", (f"run.dir={tmp_path}/runs/shop",))


@pytest.mark.parametrize(
    ("logs", "reason"),
    [
        (b"", "no records"),
        (b"click,user,at\n", "no records"),
        (b"click,user,at\n" + b"1,ann\n" * 50, "50 of 50 records are bad"),
        (b"PK\x03\x04\0\0", "a zip archive"),
    ],
)
def test_a_day_with_unusable_logs_does_not_stop_later_ones(
    config: Config, tmp_path: Path, logs: bytes, reason: str
) -> None:
    (tmp_path / f"{DAYS[1]}.csv").write_bytes(logs)
    for _ in range(2):
        parts = stages.day_parts(config, DAYS[2])
        assert sorted(parts) == [DAYS[0], DAYS[2]]
        held = daily.held_days(config)
        assert list(held) == [DAYS[1]] and reason in held[DAYS[1]].reasons[0]
    run = daily.pin_day(config, DAYS[2], parts)
    assert run.day is not None and run.day.left_out == (DAYS[1],)
    assert finished.known_day(config, DAYS[2]) == run, "the same again is known"
    with pytest.raises(UserError, match=rf"{DAYS[1]} cannot be accepted, .*; repair its logs"):
        daily.accept(config, DAYS[1])
    with pytest.raises(DataError, match=rf"{DAYS[1]} is in quarantine until its logs are repaired: .*{reason}"):
        stages.day_parts(config, DAYS[1])
    write(tmp_path, DAYS[1])
    assert finished.known_day(config, DAYS[2]) is None, "repaired logs are something new"
    assert sorted(stages.day_parts(config, DAYS[2])) == list(DAYS)
    assert not daily.held_days(config)


def test_a_day_that_was_good_once_is_left_out_once_it_is_broken(config: Config, tmp_path: Path) -> None:
    assert sorted(stages.day_parts(config, DAYS[2])) == list(DAYS)
    (tmp_path / f"{DAYS[0]}.csv").write_text("")
    assert sorted(stages.day_parts(config, DAYS[2])) == list(DAYS[1:])
    assert list(daily.held_days(config)) == [DAYS[0]]


def test_a_column_that_a_day_has_lost_stops_the_run_and_puts_no_day_aside(config: Config, tmp_path: Path) -> None:
    (tmp_path / f"{DAYS[1]}.csv").write_text("click,at\n1,2026-01-02T00:00:00\n")
    with pytest.raises(DataError, match=r"2026-01-02.csv: no column 'user'"):
        stages.day_parts(config, DAYS[2])
    assert not daily.held_days(config)


@pytest.mark.parametrize("table", [b"PK\x03\x04\0\0", b"user,age\nann\n", b""])
def test_a_side_table_at_fault_puts_no_day_aside(tmp_path: Path, table: bytes) -> None:
    (tmp_path / "users.csv").write_bytes(table)
    (tmp_path / "shop.toml").write_text(TOML + '[[source.join]]\npath = "users.csv"\non = "user"\n')
    for day in DAYS:
        write(tmp_path, day)
    config = load_config(tmp_path / "shop.toml", (f"run.dir={tmp_path}/runs/shop",))
    with pytest.raises(DataError, match=r"users.csv"):
        stages.day_parts(config, DAYS[2])
    assert not daily.held_days(config)

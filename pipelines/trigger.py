"""When a schedule starts a run: by a cron line of six fields, or by an interval.

The first field of Kubeflow's cron lines is seconds. Kubeflow accepts a line of five fields too, but takes the first one
for seconds: ``0 3 * * *`` would start a run three minutes past every hour. So a line of five fields, as crontab writes
it, is given 0 seconds here.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from des_core.errors import UserError

EXAMPLE = '"0 0 3 * * *" (seconds first: every day at 03:00)'

FIELDS = (
    ("seconds", 0, 59, ()),
    ("minutes", 0, 59, ()),
    ("hours", 0, 23, ()),
    ("day of month", 1, 31, ()),
    ("month", 1, 12, ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")),
    ("day of week", 0, 6, ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")),
)
"""Of each field: name, smallest and largest value, and names for the values, from the smallest on."""

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class Trigger(NamedTuple):
    """A cron line or an interval; the other one is empty."""

    cron: str = ""
    interval_s: int = 0

    def __str__(self) -> str:
        return f"cron {self.cron}" if self.cron else f"every {self.interval_s} s"


def from_cron(line: str) -> Trigger:
    """The trigger of a cron line.

    Raises:
        UserError: the line does not have six fields, or a field has a value that it cannot have.
    """
    words = line.split()
    fields = ["0", *words] if len(words) == 5 else words
    if len(fields) != 6:
        raise UserError(f'--cron "{line}": it must have six fields, like {EXAMPLE}')
    for word, (name, least, most, names) in zip(fields, FIELDS, strict=True):
        for item in word.split(","):
            if not _fits(item.upper(), least, most, names):
                raise UserError(
                    f'--cron "{line}": {item!r} is no value of {name} ({least}-{most}); write it like {EXAMPLE}'
                )
    return Trigger(cron=" ".join(fields))


def from_interval(text: str) -> Trigger:
    """The trigger of an interval like 24h.

    Raises:
        UserError: the text is not a number and a unit.
    """
    match = re.fullmatch(r"([1-9]\d{0,8})([smhd])", text.strip())
    if not match:
        raise UserError(f"--interval {text}: write a number and s, m, h or d, like 24h")
    return Trigger(interval_s=int(match[1]) * UNITS[match[2]])


def _fits(item: str, least: int, most: int, names: tuple[str, ...]) -> bool:
    """Whether ``item`` is ``*``, ``?``, a value or a range, with a step or without."""
    span, slash, step = item.partition("/")
    if slash and not re.fullmatch(r"[1-9]\d*", step):
        return False
    if span in ("*", "?"):
        return True
    ends = [
        names.index(end) + least if end in names else int(end) if end.isdecimal() else -1 for end in span.split("-")
    ]
    return len(ends) <= 2 and all(least <= end <= most for end in ends) and ends == sorted(ends)

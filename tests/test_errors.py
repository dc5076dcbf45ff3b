"""A failure is known by its class, between processes by a code that does not change."""

from __future__ import annotations

import re
from pathlib import Path

from des_core.errors import DesError, UserError, error_classes, error_of

OPERATIONS = Path(__file__).parent.parent / "docs" / "operations.md"


def test_every_class_has_a_code_of_its_own_and_comes_back_by_it() -> None:
    classes = error_classes()
    assert len({each.code for each in classes}) == len(classes) > 15
    for each in classes:
        again = error_of(each.code, "what happened")
        assert (type(again), str(again)) == (each, "what happened")
        assert each.exit_code == (2 if issubclass(each, UserError) else 1)
        assert not (each.transient and issubclass(each, UserError)), "a user's mistake does not pass by itself"


def test_a_code_of_another_version_is_still_an_error() -> None:
    assert type(error_of("no-such-code", "x")) is DesError


def test_the_table_of_codes_lists_every_class() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \| ([12]) \| (yes|no) \|", OPERATIONS.read_text(encoding="utf-8"), re.M)
    listed = {code: (int(exit_code), transient == "yes") for code, exit_code, transient in rows}
    assert listed == {each.code: (each.exit_code, each.transient) for each in error_classes()}

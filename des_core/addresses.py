"""Addresses made from paths, and paths found in addresses."""

from __future__ import annotations

import urllib.parse

SQLITE = "sqlite:///"


def sqlite_address(path: str) -> str:
    """The address of an SQLite file. A question mark would begin a query, and a percent sign is an escape."""
    return SQLITE + path.replace("%", "%25").replace("?", "%3F")


def sqlite_path(address: str) -> str:
    """The file of an SQLite address; anything else as it is."""
    if not address.startswith(SQLITE):
        return address
    return urllib.parse.unquote(address.removeprefix(SQLITE).partition("?")[0])

"""Secrets in what is written: one detector for logs, messages, reports, tags and compiled pipelines.

scheme://USER:PASSWORD@host, scheme://TOKEN@host        the user's part of an address
?password=..., ?token=..., ?sig=...                     a query's value whose name says what it is
the value of an environment variable with such a name, or one that was remembered
"""

from __future__ import annotations

import os
import re
import urllib.parse

_NAMES = r"password|passwd|pwd|token|secret|signature|sig|api_?key|access_?key|credentials?"
_USER = re.compile(r"""://(?:[^:/@\s"']*:[^\s"']*|[^/@\s"']+)@""")
_QUERY = re.compile(rf"""([?&;](?:[\w.-]*[_.-])?(?:ssl)?(?:{_NAMES})=)[^&;\s"']*""", re.IGNORECASE)
_VARIABLE = re.compile(r"PASSWORD|PASSWD|SECRET|TOKEN|API_?KEY|WEBHOOK|CREDENTIAL", re.IGNORECASE)
SHORTEST = 8
"""Characters of a value that is looked for in texts; a shorter one is in too many by chance."""

_remembered: set[str] = set()


def without_secrets(text: str) -> str:
    """The text, with *** for what the form of an address shows to be secret."""
    return _QUERY.sub(r"\1***", _USER.sub("://***@", text))


def hidden(text: str) -> str:
    """The text without the secrets of its addresses, and without those that this process knows."""
    text = without_secrets(text)
    for value in sorted(_known(), key=len, reverse=True):
        text = text.replace(value, "***")
    return text


def remember(address: str) -> None:
    """Know an address of which the path is the secret, as a webhook's is."""
    parts = urllib.parse.urlsplit(address)
    path = urllib.parse.urlunsplit(("", "", parts.path, parts.query, "")).lstrip("/")
    _remembered.update(value for value in (address, path) if len(value) >= SHORTEST)


def host_only(address: str) -> str:
    """A webhook's address without the path and query that are its password."""
    return re.sub(r"(://[^/?]*[/?]).+", r"\1***", without_secrets(address))


def _known() -> set[str]:
    named = {value for name, value in os.environ.items() if _VARIABLE.search(name) and len(value) >= SHORTEST}
    return named | _remembered

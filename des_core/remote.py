"""Waits for servers that do not answer yet, with a limit, and tells them apart from those that refuse.

A connection that is refused, reset or timed out, a name that is not resolved, and an answer of 408, 425, 429 or 5xx
are passing: nobody's mistake, and gone when the server is up. Everything else is an answer and final.
"""

from __future__ import annotations

import http.client
import os
import re
import socket
import time
import urllib.error
from collections.abc import Callable
from typing import TypeVar

from des_core import log
from des_core.errors import UnavailableError

Answer = TypeVar("Answer")

PASSING_STATUSES = frozenset((408, 425, 429, 500, 502, 503, 504))
"""HTTP statuses of a server that may soon answer otherwise."""

IN_PODS_S, ELSEWHERE_S = 300.0, 10.0
"""How long a server is waited for: on a cluster everything may be starting at once."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
TELL_S = 60.0
"""Between two lines about the same wait."""

_PASSING_WORDS = re.compile(
    r"connection (?:was )?(?:refused|reset|aborted|timed out|closed|broken)|(?:couldn't|could not) (?:connect|resolve)"
    r"|failed to (?:connect|resolve)|temporary failure in name resolution|name or service not known"
    r"|timed? ?out|timeout was reached|network_connection|curlcode: (?:6|7|28|35|52|55|56)\b|slow_?down"
    r"|service_?unavailable|too many requests|max retries exceeded|(?:status|code):? (?:408|425|429|50[0234])\b"
    r"|the database system is (?:starting up|shutting down)|server closed the connection|remote end closed",
    re.IGNORECASE,
)
"""How libraries that hide the cause of a failure spell a passing one."""


def patience_s() -> float:
    """Seconds that a server is waited for by default."""
    return IN_PODS_S if os.environ.get("KUBERNETES_SERVICE_HOST") else ELSEWHERE_S


def passing(error: BaseException) -> bool:
    """Whether the same request may succeed later without anybody's doing."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code in PASSING_STATUSES
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, BaseException):
        return passing(error.reason)
    if isinstance(error, (ConnectionError, TimeoutError, socket.gaierror, http.client.HTTPException)):
        # InvalidURL is the caller's.
        return not isinstance(error, http.client.InvalidURL)
    return bool(_PASSING_WORDS.search(str(error)))


def raise_passing(uri: str, error: BaseException) -> None:
    """Raise ``UnavailableError`` if an object store's failure in the middle of a step is a passing one.

    Raises:
        UnavailableError: the same step may succeed later.
    """
    if "://" in uri and passing(error):
        raise UnavailableError(f"{uri}: the store failed: {' '.join(str(error).split())}") from None


def wait_for(what: str, ask: Callable[[], Answer], wait_s: float) -> Answer:
    """The answer of ``ask``, which is asked again while it raises ``UnavailableError``.

    Args:
        what: the server, for the line that says what is waited for.
        wait_s: seconds since the first attempt after which no other is begun.

    Raises:
        UnavailableError: that of the last attempt, and how long it was waited for.
    """
    start, pause_s, told = time.monotonic(), FIRST_PAUSE_S, -TELL_S
    while True:
        try:
            return ask()
        except UnavailableError as error:
            waited_s = time.monotonic() - start
            if waited_s + pause_s > wait_s:
                raise UnavailableError(f"{error} (waited {waited_s:.0f} s)") from None
            if waited_s - told >= TELL_S:
                told = waited_s
                log.emit("waiting", remote=what, why=str(error), waited_s=round(waited_s), limit_s=round(wait_s))
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

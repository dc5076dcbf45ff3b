"""What is waited for and what is final, and for how long."""

from __future__ import annotations

import http.client
import socket
import time
import urllib.error
from email.message import Message

import pytest

from des_core import remote
from des_core.errors import UnavailableError


def answer(status: int) -> urllib.error.HTTPError:
    return urllib.error.HTTPError("http://h", status, "said", Message(), None)


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (ConnectionRefusedError(111, "Connection refused"), True),
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (TimeoutError("timed out"), True),
        (socket.gaierror(-3, "Temporary failure in name resolution"), True),
        (socket.gaierror(-2, "Name or service not known"), True),
        (http.client.RemoteDisconnected("Remote end closed connection without response"), True),
        (http.client.InvalidURL("nonnumeric port"), False),
        (urllib.error.URLError(ConnectionRefusedError()), True),
        (urllib.error.URLError("unknown url type"), False),
        *[(answer(status), True) for status in (408, 429, 500, 502, 503, 504)],
        *[(answer(status), False) for status in (400, 401, 403, 404, 405, 409, 422)],
        # As pyarrow, MLflow and psycopg put it.
        (OSError("AWS Error NETWORK_CONNECTION during HeadBucket: curlCode: 7, Couldn't connect to server"), True),
        (OSError("AWS Error SLOW_DOWN during PutObject operation"), True),
        (OSError("AWS Error ACCESS_DENIED during HeadObject operation: No response body."), False),
        (OSError("AWS Error NO_SUCH_BUCKET during HeadBucket operation"), False),
        (Exception("API request to x failed with exception HTTPConnectionPool: Max retries exceeded with url"), True),
        (Exception("connection failed: FATAL:  the database system is starting up"), True),
        (Exception('FATAL:  password authentication failed for user "mlflow"'), False),
        (OSError(28, "No space left on device"), False),
        (PermissionError(13, "Permission denied"), False),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_what_passes(error: Exception, passes: bool) -> None:
    assert remote.passing(error) is passes


def test_a_server_is_waited_for_and_the_wait_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    failures = [UnavailableError("not yet"), UnavailableError("not yet")]

    def ask() -> str:
        if failures:
            raise failures.pop()
        return "here"

    assert remote.wait_for("the store", ask, 10.0) == "here"
    (line,) = capfd.readouterr().err.splitlines()
    assert "the store" in line and "limit_s=10" in line


def test_the_wait_has_an_end_and_a_refusal_none() -> None:
    def never() -> None:
        raise UnavailableError("the store is away")

    start = time.monotonic()
    with pytest.raises(UnavailableError, match=r"^the store is away \(waited [01] s\)$"):
        remote.wait_for("the store", never, 1.0)
    assert time.monotonic() - start < 3

    def refuse() -> None:
        raise PermissionError("no")

    with pytest.raises(PermissionError):
        remote.wait_for("the store", refuse, 10.0)


def test_in_a_pod_more_time_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert remote.patience_s() == 10.0
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert remote.patience_s() == 300.0

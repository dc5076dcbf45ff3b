"""What one replica takes on at once: connections, headers and bodies in time, bytes of bodies, requests.

Beyond it a client is told to come again (503 with retry-after), or left (408): whoever holds something back, in many
connections or in one byte a second, holds nothing of the others.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from typing import TYPE_CHECKING, Any, NamedTuple

from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    from starlette.requests import Request

RETRY_S = 1
"""What a client is told to wait."""

MOST_CONNECTIONS = 1000
SPARE_FILES = 100
"""Open files that a process needs beside its connections."""


class Limits(NamedTuple):
    """Bounds of one replica."""

    body: int
    """Bytes of one body."""
    bodies: int
    """Bytes of all bodies that have begun to come and are not answered."""
    requests: int
    """Requests that wait or are scored."""
    connections: int = MOST_CONNECTIONS
    header_s: float = 20.0
    """For a connection's request line and headers, from their first byte on; and for the first byte."""
    body_s: float = 30.0
    """For the whole body."""


def limits_of(threads: int, max_body: int) -> Limits:
    """Bounds by the number of threads that score and the largest body, bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard and soft < MOST_CONNECTIONS + SPARE_FILES:
        soft = min(hard, MOST_CONNECTIONS + SPARE_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    connections = max(1, min(MOST_CONNECTIONS, soft - SPARE_FILES))
    return Limits(body=max_body, bodies=4 * max_body, requests=32 * threads, connections=connections)


class Refused(Exception):
    """A request that is not taken on; the rest of it is not read."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Load:
    """What a replica has in hand. All of it is counted in the event loop's thread."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.requests = 0
        self.bytes = 0
        self.refused_connections = 0

    async def body_of(self, request: Request) -> bytes:
        """A request's body; its bytes are held until ``free``.

        Raises:
            Refused: it is too large, too slow, or one too many.
        """
        announced = request.headers.get("content-length", "0")
        if announced.isdigit() and int(announced) > self.limits.body:
            raise self._too_large()
        pieces: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.limits.body_s):
                async for piece in request.stream():
                    size += len(piece)
                    self.bytes += len(piece)
                    pieces.append(piece)
                    if size > self.limits.body:
                        raise self._too_large()
                    if self.bytes > self.limits.bodies:
                        raise Refused(503, "the bodies of all requests are too large together; try again")
        except TimeoutError:
            self.bytes -= size
            raise Refused(408, f"the body did not come within {self.limits.body_s:g} s") from None
        except BaseException:
            self.bytes -= size
            raise
        return b"".join(pieces)

    def free(self, body: bytes) -> None:
        """A body was answered."""
        self.bytes -= len(body)

    def _too_large(self) -> Refused:
        return Refused(413, f"the body is larger than {self.limits.body >> 20} MiB; send fewer records at once")


def connection_type(load: Load) -> type[H11Protocol]:
    """A connection type that refuses connections beyond the limit and closes those whose headers are late."""

    class Connection(H11Protocol):
        taken = False
        late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            if len(self.connections) >= load.limits.connections:
                load.refused_connections += 1
                head = f"HTTP/1.1 503 Service Unavailable\r\nretry-after: {RETRY_S}\r\n"
                transport.write(f"{head}content-length: 0\r\nconnection: close\r\n\r\n".encode())
                transport.close()
                return
            self.taken = True
            super().connection_made(transport)
            self._expect()

        def connection_lost(self, exc: Exception | None) -> None:
            self._expected()
            if self.taken:
                super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if not self.taken:
                return
            if self.late is None and not self._busy():
                self._expect()
            super().data_received(data)
            if self._busy():
                self._expected()

        def _busy(self) -> bool:
            """Whether a request's headers are here and it is not answered."""
            return self.cycle is not None and not self.cycle.response_complete

        def _expect(self) -> None:
            self.late = self.loop.call_later(load.limits.header_s, self._leave)

        def _expected(self) -> None:
            if self.late is not None:
                self.late.cancel()
                self.late = None

        def _leave(self) -> None:
            self.late = None
            if not self.transport.is_closing():
                self.transport.write(b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
                self.transport.close()

    # A line for each connection that is no HTTP, or that could not be accepted, would fill a disk.
    for name in ("uvicorn", "uvicorn.error", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return Connection

"""One replica that serves whatever version an alias points at, over MLflow's scoring protocol.

    /invocations             scores, by the protocol of payload.py; x-des-model-version says who answered
    /ready                   200 once a model is loaded and warm, 503 with the reason until then
    /metrics                 what monitor.py counts
    /ping, /health           200 as long as the process lives
    /version                 MLflow's

A thread asks the registry every few seconds. A version it has not loaded is fetched, verified and warmed up (compiled
code loaded, kernels run) beside the one that serves, and then takes its place in one assignment: a request keeps
the version it began with. Whatever fails on this way (no registry, no champion, a broken artifact) is said once, tried
again later and next, and leaves the present version serving.

Scoring runs in as many threads as there are CPUs: kernels and forward code run outside the interpreter's lock.
"""

from __future__ import annotations

import json
import shutil
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from des_core import log, scratch
from des_core.errors import DataError, DesError, RegistryError, UnavailableError, UserError, of_system
from des_core.release.registry import registry
from des_core.release.serve import monitor, payload
from des_core.release.serve.limits import RETRY_S, Limits, Load, Refused, connection_type, limits_of
from des_core.release.serve.serving import Scored, Scorer

if TYPE_CHECKING:
    import uvicorn
    from starlette.requests import Request
    from starlette.responses import Response

VERSION_HEADER = "x-des-model-version"
DRAIN_S = 30
"""Time for requests in flight after SIGTERM."""

JOIN_S = 5.0
"""Time for a look at the registry that is under way when the process ends."""

LONGEST_RETRY_S = 600.0
"""Longest wait before a version that failed is tried again."""

KEEP_ALIVE_S = 75
"""Longer than load balancers keep a connection, so that it is never we who close one that they are about to use."""

CODES = {
    400: "INVALID_PARAMETER_VALUE",
    408: "DEADLINE_EXCEEDED",
    413: "REQUEST_LIMIT_EXCEEDED",
    415: "INVALID_PARAMETER_VALUE",
    500: "INTERNAL_ERROR",
    503: "TEMPORARILY_UNAVAILABLE",
}
"""MLflow's names for what a status means."""


class Loaded:
    """A version that is ready to answer.

    Args:
        place: the folder it was downloaded into; it goes when the last request that uses the model has ended.
        root, memory: as for ``Scorer``.
        before: the version that serves, of whose files most are this one's too.

    Raises:
        DesError: the model is not whole, or scores no numbers.
    """

    def __init__(
        self, version: str, folder: str, place: str, root: str = "", memory: int = 0, before: Loaded | None = None
    ) -> None:
        weakref.finalize(self, shutil.rmtree, place, ignore_errors=True)
        self.version = version
        self.scorer: Scorer = Scorer(folder, root, None if before is None else before.scorer, memory)
        self.scores = monitor.Scores(self.scorer)
        texts = {field.column for field in self.scorer.description.fields if field.form == "text"}
        for value in ("1", 1, 1.5, None):
            # "1" is a value of any kind of field; each type has compiled code of its own.
            record = {name: "1" if name in texts and value == 1.5 else value for name in self.scorer.columns}
            records = [record, dict.fromkeys(self.scorer.columns)]
            self.score(json.dumps({"dataframe_records": records}).encode(), "application/json")

    def score(self, body: bytes, kind: str) -> Scored:
        """The scores of a request's body.

        Raises:
            DataError: the body is not as the model needs it.
        """
        scored = self.scorer.scored(payload.read(body, kind, self.scorer.columns))
        if not np.isfinite(scored.scores_B).all():
            raise DesError(f"version {self.version} scores no finite number")
        return scored


class Replica:
    """The model version that this process serves, kept up to date with the registry.

    Args:
        model_uri: models:/NAME@ALIAS or models:/NAME/VERSION.
        poll_s: between two looks at the registry.
        root, memory: as for ``Scorer``.
    """

    def __init__(self, model_uri: str, tracking_uri: str, poll_s: float = 2.0, root: str = "", memory: int = 0) -> None:
        self.model_uri, self.tracking_uri = model_uri, tracking_uri
        self.name = registry.parts_of(model_uri)[0]
        self.monitor = monitor.Server()
        self.current: Loaded | None = None
        self.reason = "the model is being loaded"
        """Why there is none."""
        self._poll_s, self._root, self._memory = poll_s, root, memory
        self._said: dict[str, str] = {}
        self._retry, self._tries = 0.0, 0
        # The registry's client turns sys.stderr away while it works.
        self._stderr = sys.stderr

    def say(self, event: str, **fields: object) -> None:
        """Write one line of the log."""
        log.emit(event, to=self._stderr, **fields)

    def follow(self, stop: threading.Event) -> None:
        """Poll the registry until told to stop."""
        while not stop.is_set():
            try:
                self.look()
            except Exception as error:
                self._trouble("registry_trouble", f"unexpected {type(error).__name__}: {error}")
            stop.wait(self._poll_s)

    def look(self) -> None:
        """Poll the registry once, and load a new version if there is one."""
        try:
            version = registry.resolve(self.model_uri, self.tracking_uri)
        except (RegistryError, UnavailableError) as error:
            self.monitor.registry_up = False
            self._trouble("registry_trouble", str(error))
            return
        self.monitor.registry_up = True
        self._settled("registry_trouble")
        if not version:
            self._trouble("no_version", f"{self.model_uri} does not exist yet at the registry")
            return
        self._settled("no_version")
        if self.current is not None and version == self.current.version:
            self.monitor.failed = ""
            self._settled("version_failed")
        elif version != self.monitor.failed or time.monotonic() >= self._retry:
            self._take(version)

    def _take(self, version: str) -> None:
        """Fetch, warm up and swap in a version; if that fails the present one stays."""
        started = time.monotonic()
        self.reason = f"version {version} is being loaded"
        place = scratch.make("serve")
        try:
            found = registry.fetch(f"models:/{self.name}/{version}", self.tracking_uri, place)
            folder = _own(found.folder, place)
            loaded = Loaded(version, folder, place, self._root, self._memory, self.current)
        except Exception as error:
            shutil.rmtree(place, ignore_errors=True)
            self._failed(version, error, place)
            return
        before = "" if self.current is None else self.current.version
        self.current = loaded
        self.monitor.swaps += 1
        self.monitor.failed = ""
        self._settled("version_failed")
        read = {"mb": loaded.scorer.rows.size / 1e6, "verified_mb": loaded.scorer.verified_bytes / 1e6}
        seconds = time.monotonic() - started
        self.say("serving", model=self.model_uri, version=version, before=before, seconds=seconds, **read)

    def _failed(self, version: str, error: Exception, place: str) -> None:
        self._tries = self._tries + 1 if version == self.monitor.failed else 1
        self._retry = time.monotonic() + min(LONGEST_RETRY_S, self._poll_s * 2**self._tries)
        self.monitor.failures += 1
        self.monitor.failed = version
        known = of_system(error) if isinstance(error, OSError) else error
        what = str(known) if isinstance(known, DesError) else f"unexpected {type(error).__name__}: {error}"
        # The folder's name is another at each try.
        self._trouble("version_failed", f"version {version} cannot be served: {what.replace(f'{place}/', '')}")

    def _trouble(self, event: str, reason: str) -> None:
        """Say once what is wrong, and what is served meanwhile."""
        self.reason = " ".join(reason.split())
        if self._said.get(event) != self.reason:
            self._said[event] = self.reason
            meanwhile = f"version {self.current.version}" if self.current else "nothing"
            self.say(event, reason=self.reason, serving=meanwhile)

    def _settled(self, event: str) -> None:
        if self._said.pop(event, None):
            self.say(f"{event}_over")


def _own(folder: str, place: str) -> str:
    """A copy of a model that is read in place: files of an artifact store are not sure to be written only once."""
    if Path(folder).resolve().is_relative_to(Path(place).resolve()):
        return folder
    return str(shutil.copytree(folder, Path(place) / "model"))


def app_of(replica: Replica, threads: int, load: Load) -> Any:
    """The ASGI app of a replica, with the addresses of MLflow's scoring server.

    Args:
        threads: requests scored at once.
        load: what the replica has in hand, and its limits.
    """
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect
    from starlette.responses import Response
    from starlette.routing import Route

    pool = ThreadPoolExecutor(threads, thread_name_prefix="score")
    replica.monitor.load = load

    async def invocations(request: Request) -> Response:
        started = time.perf_counter()
        try:
            response = await _invocation(request, replica, pool, load)
        except ClientDisconnect:
            response = Response(status_code=499)
        except Refused as refused:
            response = _refusal(refused.status, str(refused))
            if refused.status == 408:
                # Of others, what is left of the body is read and dropped, or they would not see the answer.
                response.headers["connection"] = "close"
        replica.monitor.count(response.status_code, time.perf_counter() - started)
        return response

    async def ready(request: Request) -> Response:
        loaded = replica.current
        if loaded is None:
            return _json(503, {"ready": False, "model": replica.model_uri, "reason": replica.reason})
        return _json(200, {"ready": True, "model": replica.model_uri, "version": loaded.version})

    async def metrics(request: Request) -> Response:
        loaded = replica.current
        version, scores = ("", None) if loaded is None else (loaded.version, loaded.scores)
        text = monitor.page(replica.monitor, replica.name, version, scores)
        return Response(text, headers={"content-type": monitor.CONTENT_TYPE})

    async def alive(request: Request) -> Response:
        return Response("\n", media_type="application/json")

    async def mlflow(request: Request) -> Response:
        return Response(metadata.version("mlflow"), media_type="application/json")

    routes: list[tuple[str, Callable[[Request], Awaitable[Response]], str]] = [
        ("/invocations", invocations, "POST"),
        ("/ready", ready, "GET"),
        ("/metrics", metrics, "GET"),
        ("/ping", alive, "GET"),
        ("/health", alive, "GET"),
        ("/version", mlflow, "GET"),
    ]
    return Starlette(routes=[Route(path, endpoint, methods=[method]) for path, endpoint, method in routes])


async def _invocation(request: Request, replica: Replica, pool: ThreadPoolExecutor, load: Load) -> Response:
    """The answer of a version, or why there is none."""
    import asyncio

    loaded = replica.current
    if loaded is None:
        return _refusal(503, f"no model is served yet: {replica.reason}")
    kind, _, parameters = request.headers.get("content-type", "").lower().partition(";")
    if kind.strip() not in payload.READERS or parameters.strip() not in ("", "charset=utf-8"):
        return _refusal(415, f"content-type must be {' or '.join(payload.READERS)}, in UTF-8")
    if load.requests >= load.limits.requests:
        raise Refused(503, f"{load.requests} requests are in hand, as many as this replica takes; try again")
    load.requests += 1
    try:
        body = await load.body_of(request)
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, _answer, replica, loaded, body, kind.strip())
        finally:
            load.free(body)
    finally:
        load.requests -= 1


def _answer(replica: Replica, loaded: Loaded, body: bytes, kind: str) -> Response:
    """Scores, or what is wrong with the body; runs in a thread."""
    try:
        scored = loaded.score(body, kind)
    except payload.TooManyError as error:
        return _refusal(413, str(error), loaded.version)
    except DataError as error:
        return _refusal(400, str(error), loaded.version)
    except Exception as error:
        # Not its text: that may hold values.
        what = type(error).__name__
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        where = "" if frame is None else f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}"
        replica.say("request_failed", reason=what, where=where, version=loaded.version)
        return _refusal(500, f"unexpected {what}; the server's log says where", loaded.version)
    loaded.scores.add(scored)
    return _json(200, {"predictions": scored.scores_B.tolist()}, {VERSION_HEADER: loaded.version})


def _refusal(status: int, message: str, version: str = "") -> Response:
    """An error as MLflow's clients read it."""
    headers = ({VERSION_HEADER: version} if version else {}) | ({"retry-after": str(RETRY_S)} if status == 503 else {})
    return _json(status, {"error_code": CODES[status], "message": " ".join(message.split())}, headers)


def _json(status: int, content: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    from starlette.responses import Response

    return Response(json.dumps(content), status, headers, "application/json")


def config_of(replica: Replica, threads: int, limits: Limits) -> uvicorn.Config:
    """How uvicorn serves a replica."""
    import uvicorn

    load = Load(limits)
    return uvicorn.Config(
        app_of(replica, threads, load),
        http=connection_type(load),
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=DRAIN_S,
    )


def serve(replica: Replica, host: str, port: int, threads: int, max_body: int) -> None:
    """Serve until SIGTERM or SIGINT, then finish the requests in flight.

    Args:
        port: 0 for any that is free; the log line ``listening`` names it.

    Raises:
        UserError: the address cannot be had.
    """
    import uvicorn

    try:
        address = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port}: {reason}; choose another") from None
    # Accepted connections have it from here; asyncio does not set it on sockets that others made, and then the second
    # piece of every answer waits 40 ms for the first one's acknowledgement.
    address.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    server = uvicorn.Server(config_of(replica, threads, limits_of(threads, max_body)))
    # uvicorn drains on SIGTERM and then raises it again for whoever had it before: nobody, so that we leave with 0.
    signal.signal(signal.SIGTERM, lambda *_: setattr(server, "should_exit", True))
    stop = threading.Event()
    follower = threading.Thread(target=replica.follow, args=(stop,), name="follow", daemon=True)
    replica.say("listening", host=host, port=address.getsockname()[1], threads=threads, model=replica.model_uri)
    follower.start()
    try:
        server.run(sockets=[address])
    finally:
        stop.set()
        # It holds standard output and error while it talks to the registry.
        follower.join(JOIN_S)
        replica.say("stopped", requests=replica.monitor.requests.total())

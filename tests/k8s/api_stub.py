"""A small Kubernetes API server in this process: the few resources that a training job needs, and their troubles."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

PATH = re.compile(
    r"/apis?/(?:(?P<group>[\w.]+)/)?v1/namespaces/des/(?P<plural>\w+)(?:/(?P<name>[\w.-]+))?(?P<log>/log)?$"
)
GROUPS = {"pytorchjobs": "kubeflow.org", "rayjobs": "ray.io"}


@dataclass
class Fault:
    """An answer in place of the right one, a number of times."""

    verb: str
    plural: str
    status: int
    message: str
    times: int
    after: bool = False
    """Whether the request is done before it is answered so."""


@dataclass
class ApiStub:
    """The server's state; ``url`` while it serves."""

    url: str = ""
    objects: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    history: list[tuple[int, str, str, dict[str, Any]]] = field(default_factory=list)
    version: int = 100
    horizon: int = 0
    """Watches from an older version are answered 410."""
    faults: list[Fault] = field(default_factory=list)
    asked: list[tuple[str, str]] = field(default_factory=list)
    """Verb and resource of each request."""
    bodies: list[Any] = field(default_factory=list)
    """Of creates and patches."""
    logs: dict[str, list[str]] = field(default_factory=dict)
    """Whole lines with their times, by pod."""
    created: Callable[[dict[str, Any]], None] = lambda job: None
    """What the operator does with a new job."""
    gone_after_s: float = 0.0
    """How long a deletion takes."""
    cuts: int = 0
    """Raised to cut all open streams."""
    garble: bool = False
    """Whether a cut comes in mid-line."""
    lock: threading.Condition = field(default_factory=threading.Condition)

    def put(self, plural: str, thing: dict[str, Any]) -> dict[str, Any]:
        """Create or replace an object, as ``kubectl`` would."""
        with self.lock:
            self.version += 1
            key = (plural, thing["metadata"]["name"])
            kind = "MODIFIED" if key in self.objects else "ADDED"
            thing["metadata"].setdefault("uid", f"uid-{self.version}")
            thing["metadata"]["resourceVersion"] = str(self.version)
            self.objects[key] = thing
            self.history.append((self.version, plural, kind, json.loads(json.dumps(thing))))
            self.lock.notify_all()
        return thing

    def remove(self, plural: str, name: str) -> None:
        """Take an object away at once, with a job's pods."""
        with self.lock:
            thing = self.objects.pop((plural, name), None)
            if thing is None:
                return
            self.version += 1
            thing["metadata"]["resourceVersion"] = str(self.version)
            self.history.append((self.version, plural, "DELETED", thing))
            self.lock.notify_all()
        if plural in GROUPS:
            for kind, pod in list(self.objects):
                if kind == "pods" and pod.startswith(f"{name}-"):
                    self.remove(kind, pod)

    def condition(self, name: str, kind: str, reason: str = "", message: str = "") -> None:
        """Give a job a condition that is true."""
        job = json.loads(json.dumps(self.objects["pytorchjobs", name]))
        said = {"type": kind, "status": "True", "reason": reason, "message": message}
        others = [one | {"status": "False"} for one in job.get("status", {}).get("conditions", [])]
        job["status"] = {"conditions": [*others, said]}
        self.put("pytorchjobs", job)

    def ray_status(self, name: str, **status: str) -> None:
        """Give a RayJob a status."""
        job = json.loads(json.dumps(self.objects["rayjobs", name]))
        job["status"] = status
        self.put("rayjobs", job)

    def ray_pod(self, job: str, part: str, status: dict[str, Any], name: str = "") -> None:
        """Give a RayJob a pod (head, worker or submitter), or a pod another status."""
        name = f"{job}-{name or part}"
        before = self.objects.get(("pods", name), {"metadata": {}})
        labels = {"des/job": job, "des/part": part}
        stamp = {"creationTimestamp": f"2026-01-01T00:{self.version:04d}Z"}
        metadata = stamp | before["metadata"] | {"name": name, "labels": labels}
        self.put("pods", {"metadata": metadata, "spec": {}, "status": status})

    def pod(self, job: str, index: int, status: dict[str, Any]) -> None:
        """Give a job a pod, or a pod another status."""
        labels = {"training.kubeflow.org/job-name": job, "training.kubeflow.org/replica-index": str(index)}
        before = self.objects.get(("pods", f"{job}-worker-{index}"), {"metadata": {}})
        metadata = before["metadata"] | {"name": f"{job}-worker-{index}", "labels": labels}
        self.put("pods", {"metadata": metadata, "spec": {}, "status": status})

    def fail(
        self, verb: str, plural: str, status: int, message: str = "no", times: int = 1, after: bool = False
    ) -> None:
        """Answer the next requests of a kind with an error; status 0 breaks the connection."""
        self.faults.append(Fault(verb, plural, status, message, times, after))

    def cut(self) -> None:
        """Break every open stream."""
        with self.lock:
            self.cuts += 1
            self.lock.notify_all()

    def count(self, verb: str, plural: str) -> int:
        """Requests of a kind so far."""
        return self.asked.count((verb, plural))


@contextmanager
def serving() -> Iterator[ApiStub]:
    """A stub that answers while the block runs."""
    stub = ApiStub()

    class Bound(Handler):
        api = stub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
    server.daemon_threads = True
    stub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield stub
    finally:
        stub.cut()
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    api: ApiStub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        plural, name, log, query = self._where()
        # Before the request is counted: a cut by whoever has seen the count meets this stream.
        cuts = self.api.cuts
        verb = "get" if name else "watch" if query.get("watch") == "true" else "list"
        if self._faulty(verb, plural + log):
            return
        if log:
            self._log(name, query, cuts)
        elif verb == "watch":
            self._watch(plural, query, cuts)
        elif verb == "get":
            found = self.api.objects.get((plural, name))
            self._answer(200, found) if found else self._refuse(404, f'{plural} "{name}" not found')
        else:
            items = [one for (kind, _), one in self.api.objects.items() if kind == plural and _chosen(one, query)]
            self._answer(200, {"items": items, "metadata": {"resourceVersion": str(self.api.version)}})

    def do_POST(self) -> None:
        plural, _, _, _ = self._where()
        body = self._body()
        self.api.bodies.append(body)
        name = body["metadata"]["name"]
        if self._faulty("create", plural, lambda: self.api.put(plural, body)):
            return
        if (plural, name) in self.api.objects:
            self._refuse(409, f'{plural} "{name}" already exists')
            return
        self._answer(201, self.api.put(plural, body))
        self.api.created(body)

    def do_PATCH(self) -> None:
        plural, name, _, _ = self._where()
        body = self._body()
        self.api.bodies.append(body)
        if self._faulty("patch", plural):
            return
        found = self.api.objects.get((plural, name))
        if self.headers["Content-Type"] != "application/merge-patch+json":
            self._refuse(415, f"cannot patch with {self.headers['Content-Type']}")
        elif found is None:
            self._refuse(404, f'{plural} "{name}" not found')
        elif body["metadata"].pop("uid") != found["metadata"]["uid"]:
            self._refuse(409, "Precondition failed: UID in precondition")
        else:
            found["metadata"] |= body["metadata"]
            self._answer(200, self.api.put(plural, found))

    def do_DELETE(self) -> None:
        plural, name, _, _ = self._where()
        self._body()
        if self._faulty("delete", plural):
            return
        found = self.api.objects.get((plural, name))
        if found is None:
            self._refuse(404, f'{plural} "{name}" not found')
            return
        if self.api.gone_after_s:
            found["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
            self.api.put(plural, found)
            threading.Timer(self.api.gone_after_s, self.api.remove, (plural, name)).start()
        else:
            self.api.remove(plural, name)
        self._answer(200, {"status": "Success"})

    def _where(self) -> tuple[str, str, str, dict[str, str]]:
        """Plural, name, "/log" or nothing, and the query."""
        split = urlsplit(self.path)
        found = PATH.match(split.path)
        assert found, self.path
        assert (found["group"] or "") == GROUPS.get(found["plural"], ""), self.path
        query = {
            key: values[0].lower() if key in ("watch", "follow") else values[0]
            for key, values in parse_qs(split.query).items()
        }
        return found["plural"], found["name"] or "", found["log"] or "", query

    def _faulty(self, verb: str, plural: str, do: Callable[[], Any] = lambda: None) -> bool:
        self.api.asked.append((verb, plural))
        for fault in self.api.faults:
            if (fault.verb, fault.plural) == (verb, plural) and fault.times:
                fault.times -= 1
                if fault.after:
                    do()
                if fault.status:
                    self._refuse(fault.status, fault.message)
                else:
                    self.close_connection = True
                    self.connection.close()
                return True
        return False

    def _body(self) -> Any:
        size = int(self.headers.get("Content-Length", 0))
        return json.loads(self.rfile.read(size)) if size else None

    def _answer(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, status: int, message: str) -> None:
        self._answer(status, {"kind": "Status", "status": "Failure", "message": message, "code": status})

    def _begin(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def _watch(self, plural: str, query: dict[str, str], cuts: int) -> None:
        seen = int(query["resourceVersion"])
        assert 0 < int(query["timeoutSeconds"]) <= 300
        until = time.monotonic() + int(query["timeoutSeconds"])
        self._begin()
        with suppress(BrokenPipeError, ConnectionResetError):
            if seen < self.api.horizon:
                gone = {"kind": "Status", "code": 410, "message": "too old resource version"}
                self._chunk(json.dumps({"type": "ERROR", "object": gone}) + "\n")
            else:
                while time.monotonic() < until and self.api.cuts == cuts:
                    with self.api.lock:
                        new = [one for one in self.api.history if one[0] > seen and one[1] == plural]
                        if not new:
                            self.api.lock.wait(0.05)
                    for version, _, kind, thing in new:
                        seen = version
                        if _chosen(thing, query):
                            self._chunk(json.dumps({"type": kind, "object": thing}) + "\n")
                if self.api.cuts > cuts:
                    if self.api.garble:
                        self._chunk('{"type": "MODIFIED", "obj')
                    self.close_connection = True
                    self.connection.close()
                    return
            self._chunk("")

    def _log(self, pod: str, query: dict[str, str], cuts: int) -> None:
        found = self.api.objects.get(("pods", pod))
        if found is None:
            self._refuse(404, f'pods "{pod}" not found')
            return
        if found["status"].get("phase") == "Pending":
            self._refuse(400, f'container "pytorch" in pod "{pod}" is waiting to start')
            return
        lines = self.api.logs.setdefault(pod, [])
        last = int(query.get("tailLines", 0))
        self._begin()
        sent = max(0, len(lines) - last) if last else 0
        with suppress(BrokenPipeError, ConnectionResetError):
            while True:
                over = (
                    query.get("follow") != "true"
                    or self.api.objects.get(("pods", pod), {}).get("status", {}).get("phase") != "Running"
                )
                for line in lines[sent:]:
                    self._chunk((line if query.get("timestamps") else line.partition(" ")[2]) + "\n")
                    sent += 1
                if self.api.cuts > cuts:
                    self.close_connection = True
                    self.connection.close()
                    return
                if over:
                    break
                time.sleep(0.02)
            self._chunk("")


def _chosen(thing: dict[str, Any], query: dict[str, str]) -> bool:
    """Whether an object is what a selector asks for."""
    for clause in filter(None, query.get("fieldSelector", "").split(",")):
        path, _, value = clause.partition("=")
        at: Any = thing
        for word in path.split("."):
            at = at.get(word, {})
        if at != value:
            return False
    labels = thing["metadata"].get("labels", {})
    clauses = filter(None, query.get("labelSelector", "").split(","))
    return all(labels.get(clause.partition("=")[0]) == clause.partition("=")[2] for clause in clauses)

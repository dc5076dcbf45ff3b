"""A Kubeflow Pipelines API server in this process: as much of v2beta1 as a client of ours can meet.

It answers as the real one does where that surprises: an upload under a taken name is a 500, numbers come back as text,
``no_catchup`` does not come back at all, pages are short, and an empty list is no key.
"""

from __future__ import annotations

import email.parser
import email.policy
import json
import re
import ssl
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

PAGE = 2
"""Items that a page holds at most, whatever was asked for."""

KINDS = {
    "pipelines": "pipeline_id",
    "pipeline_versions": "pipeline_version_id",
    "experiments": "experiment_id",
    "runs": "run_id",
    "recurring_runs": "recurring_run_id",
}


class Refused(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class KubeflowStub:
    """What the server holds, and what was asked of it."""

    def __init__(self) -> None:
        self.host = ""
        self.token = ""
        """What a request must bear; empty: nothing."""
        self.held: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
        self.requests: list[str] = []
        """METHOD /path of each."""
        self.failures: list[tuple[str, int, str]] = []
        """Pattern of METHOD /path, status and body of answers to come, each used once."""
        self.most_enabled = 0
        """The most schedules of one name that were ever enabled together."""

    def fail(self, pattern: str, status: int, body: str = '{"code": 13, "message": "the database is away"}') -> None:
        self.failures.append((pattern, status, body))

    def names(self, kind: str) -> list[str]:
        return [one["display_name"] for one in self.held[kind]]

    def answer(self, method: str, address: str, authorization: str, content_type: str, body: bytes) -> Any:
        url = urlsplit(address)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        path = url.path.removeprefix("/apis/v2beta1")
        self.requests.append(f"{method} {path}")
        for failure in self.failures:
            if re.fullmatch(failure[0], f"{method} {path}"):
                self.failures.remove(failure)
                raise Refused(*failure[1:])
        if self.token and authorization != f"Bearer {self.token}":
            raise Refused(401, "Jwt verification fails")
        if (method, path) == ("POST", "/pipelines/upload_version"):
            return self._upload(query, content_type, body)
        sent = json.loads(body) if body else {}
        match [method, *path.strip("/").split("/")]:
            case ["POST", "pipelines" | "experiments" as kind]:
                unique = [(one["display_name"], one.get("namespace")) for one in self.held[kind]]
                if (sent["display_name"], sent.get("namespace")) in unique:
                    raise Refused(409, f"Already exist error: {sent['display_name']}")
                return self._add(kind, sent)
            case ["GET", "pipelines" | "experiments" | "runs" as kind]:
                return self._page(kind, self.held[kind], query)
            case ["GET", "pipelines", pipeline, "versions"]:
                found = [one for one in self.held["pipeline_versions"] if one["pipeline_id"] == pipeline]
                return self._page("pipeline_versions", found, query)
            case ["POST", "runs"]:
                self._check_reference(sent)
                return self._add("runs", sent)
            case ["POST", "recurringruns"]:
                return self._schedule(sent)
            case ["GET", "recurringruns"]:
                return self._page("recurring_runs", self.held["recurring_runs"], query)
            case ["POST", "recurringruns", words]:
                identity, _, verb = words.partition(":")
                self._find(identity).update({"mode": verb.upper(), "status": f"{verb.upper()}D"})
                self._count()
                return {}
            case ["DELETE", "recurringruns", identity]:
                self.held["recurring_runs"].remove(self._find(identity))
                return {}
        raise Refused(404, f"no such route: {method} {path}")

    def _upload(self, query: dict[str, str], content_type: str, body: bytes) -> dict[str, Any]:
        head = f"Content-Type: {content_type}\r\n\r\n".encode()
        parts = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
        (file,) = [
            part for part in parts.iter_parts() if part.get_param("name", header="content-disposition") == "uploadfile"
        ]
        documents = list(yaml.load_all(file.get_payload(decode=True), yaml.CSafeLoader))
        if "pipelineInfo" not in documents[0] or not str(file.get_filename()).endswith(".yaml"):
            raise Refused(400, "Failed to read pipeline version from file")
        if query["pipelineid"] not in [one["pipeline_id"] for one in self.held["pipelines"]]:
            raise Refused(404, "pipeline not found")
        taken = [(one["pipeline_id"], one["display_name"]) for one in self.held["pipeline_versions"]]
        if (query["pipelineid"], query["name"]) in taken:
            raise Refused(500, f"Failed to create: Already exist error: The name {query['name']} already exists.")
        return self._add(
            "pipeline_versions",
            {
                "pipeline_id": query["pipelineid"],
                "display_name": query["name"],
                "description": query.get("description", ""),
                "pipeline_spec": {"pipeline_spec": documents[0], "platform_spec": documents[1]},
            },
        )

    def _schedule(self, sent: dict[str, Any]) -> dict[str, Any]:
        self._check_reference(sent)
        if not 1 <= int(sent["max_concurrency"]) <= 10:
            raise Refused(400, "The max concurrency of the job is out of range. Support 1-10.")
        cron, periodic = (sent["trigger"].get(key) for key in ("cron_schedule", "periodic_schedule"))
        if (cron is None) == (periodic is None) or (cron and len(cron["cron"].split()) not in (5, 6)):
            raise Refused(400, "Schedule cron is not a supported format")
        if sent["mode"] not in ("ENABLE", "DISABLE"):
            raise Refused(400, "Invalid mode")
        made = self._add("recurring_runs", sent)
        made["status"] = f"{made['mode']}D"
        self._count()
        return made

    def _check_reference(self, sent: dict[str, Any]) -> None:
        reference = sent["pipeline_version_reference"]
        known = [(one["pipeline_id"], one["pipeline_version_id"]) for one in self.held["pipeline_versions"]]
        if (reference["pipeline_id"], reference["pipeline_version_id"]) not in known:
            raise Refused(404, "pipeline version not found")
        if sent["experiment_id"] not in [one["experiment_id"] for one in self.held["experiments"]]:
            raise Refused(404, "experiment not found")

    def _add(self, kind: str, made: dict[str, Any]) -> dict[str, Any]:
        made = {**made, KINDS[kind]: str(uuid.uuid4()), "created_at": "2026-01-31T03:00:00Z"}
        self.held[kind].append(made)
        return made

    def _find(self, identity: str) -> dict[str, Any]:
        for one in self.held["recurring_runs"]:
            if one["recurring_run_id"] == identity:
                return one
        raise Refused(404, f"ResourceNotFoundError: Job {identity} not found.")

    def _page(self, kind: str, found: list[dict[str, Any]], query: dict[str, str]) -> dict[str, Any]:
        if "filter" in query:
            (wanted,) = json.loads(query["filter"])["predicates"]
            assert wanted["operation"] == "EQUALS"
            found = [one for one in found if one[wanted["key"]] == wanted["stringValue"]]
        if "namespace" in query:
            found = [one for one in found if one.get("namespace", query["namespace"]) == query["namespace"]]
        start = int(query.get("page_token") or 0)
        items = [
            {key: value for key, value in one.items() if key != "no_catchup"} for one in found[start : start + PAGE]
        ]
        more = {"next_page_token": str(start + PAGE)} if start + PAGE < len(found) else {}
        # So spelt in the real one's answers too.
        key = "recurringRuns" if kind == "recurring_runs" else kind
        return ({key: items} if items else {}) | {"total_size": len(found)} | more

    def _count(self) -> None:
        enabled = [one["display_name"] for one in self.held["recurring_runs"] if one["mode"] == "ENABLE"]
        self.most_enabled = max([self.most_enabled, *map(enabled.count, enabled)])


@contextmanager
def serving(certificate: str = "", key: str = "") -> Iterator[KubeflowStub]:
    """A stub that answers at its ``host``, with TLS where it has a certificate."""
    stub = KubeflowStub()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = (self.headers.get(name, "") for name in ("Authorization", "Content-Type"))
            status, kind = 200, "application/json"
            with lock:
                try:
                    text = json.dumps(stub.answer(self.command, self.path, *headers, body))
                except Refused as refused:
                    status, text = refused.status, refused.message
                    if text.startswith("<"):
                        kind = "text/html"
                    elif not text.startswith("{"):
                        text = json.dumps({"code": 2, "message": text, "details": []})
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(text.encode())))
            if status == 302:
                self.send_header("Location", "/dex/auth")
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST = do_DELETE = _serve

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    stub.host = f"{'https' if certificate else 'http'}://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

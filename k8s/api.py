"""The Kubernetes API: requests that are repeated while the server does not answer, and refusals as one line.

This is the only file that imports the kubernetes client. Its own retries are switched off, because only the caller
knows what may be repeated.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from des_core.errors import ConfigError, DesError, UserError, WorkerError

PASSING = (429, 500, 502, 503, 504)
"""Statuses of a server that may soon answer otherwise."""

AWAY_S = 600.0
"""How long the API server is waited for when a single answer is needed."""
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class Api:
    """One namespace of a cluster.

    Args:
        settings: a ``kubernetes.client.Configuration``.
        pod: name of this process's own pod, or empty outside a cluster.
    """

    def __init__(self, settings: Any, namespace: str, pod: str = "") -> None:
        from kubernetes import client

        settings.retries = False
        api = client.ApiClient(settings)
        self.custom, self.core = client.CustomObjectsApi(api), client.CoreV1Api(api)
        self.namespace, self.pod = namespace, pod

    def read(self, resource: str, name: str, read: Callable[..., Any]) -> dict[str, Any]:
        """An object that must exist.

        Raises:
            UserError: it does not.
        """
        found = self.ask("get", resource, read, name, self.namespace)
        if found is None:
            raise UserError(
                f"{resource} {name} is not in namespace {self.namespace}; apply one of k8s/overlays to it, "
                f"or choose the namespace that has it"
            )
        return found

    def ask(
        self,
        verb: str,
        resource: str,
        call: Callable[..., Any],
        *words: str,
        patience_s: float = AWAY_S,
        lost: tuple[int, ...] = (),
        **more: Any,
    ) -> dict[str, Any] | None:
        """The answer to one request, repeated while the server does not answer; None if the object does not exist.

        Args:
            lost: statuses that say that another client was first; the answer is then empty.
        """
        until = time.monotonic() + patience_s
        for pause_s in pauses():
            try:
                return self.once(verb, resource, call, *words, **more)
            except failures() as error:
                if getattr(error, "status", 0) in lost:
                    return {}
                if not passes(error):
                    raise refusal(verb, resource, error) from None
                if time.monotonic() + pause_s > until:
                    raise WorkerError(f"the cluster has not answered for {patience_s:.0f} s: {said(error)}") from None
            time.sleep(pause_s)
        raise AssertionError("pauses never end")

    def once(
        self, verb: str, resource: str, call: Callable[..., Any], *words: str, **more: Any
    ) -> dict[str, Any] | None:
        """The answer to one request; None if the object does not exist.

        Raises:
            UserError: this account has no right to it.
        """
        try:
            response = call(*words, _preload_content=False, _request_timeout=(10, 30), **more)
            answer: dict[str, Any] = json.loads(response.data)
            return answer
        except failures() as error:
            status = getattr(error, "status", 0)
            if status == 404:
                return None
            if status in (401, 403):
                raise refusal(verb, resource, error) from None
            raise


def in_pod() -> bool:
    """Whether this process runs in a pod of a cluster."""
    return bool(os.environ.get("KUBERNETES_SERVICE_HOST")) and (SERVICE_ACCOUNT / "token").exists()


def connect() -> Api:
    """The cluster that this pod is in, else that of the kubeconfig's current context.

    Raises:
        ConfigError: there is neither.
    """
    from kubernetes import client, config

    settings = client.Configuration()
    if in_pod():
        config.load_incluster_config(client_configuration=settings)
        here = os.environ.get("POD_NAMESPACE") or (SERVICE_ACCOUNT / "namespace").read_text().strip()
        pod = os.environ.get("POD_NAME") or os.environ.get("KFP_POD_NAME") or socket.gethostname()
        return Api(settings, here, pod)
    try:
        file = os.environ.get("KUBECONFIG")
        config.load_kube_config(config_file=file, client_configuration=settings)
        context = config.list_kube_config_contexts(config_file=file)[1]["context"]
    except config.ConfigException as error:
        raise ConfigError(
            f"cluster.backend = 'pytorchjob' needs a cluster, and there is none here ({error}); "
            "set KUBECONFIG, run inside a pod, or set cluster.backend = 'local'"
        ) from None
    return Api(settings, context.get("namespace", "default"))


def pauses() -> Iterator[float]:
    """Seconds between attempts, ever longer, without end."""
    pause_s = 0.2
    while True:
        yield pause_s
        pause_s = min(30.0, 2 * pause_s)


def lines(response: Any) -> Iterator[str]:
    """Whole lines of a response as they arrive."""
    rest = b""
    try:
        for piece in response.stream(1 << 16, decode_content=False):
            *whole, rest = (rest + piece).split(b"\n")
            yield from (line.decode(errors="replace") for line in whole if line)
        if rest:
            yield rest.decode(errors="replace")
    finally:
        response.close()


def failures() -> tuple[type[Exception], ...]:
    """What a request may raise."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    return ApiException, HTTPError, OSError, json.JSONDecodeError


def passes(error: Exception) -> bool:
    """Whether a request may be repeated: the server is in trouble, or the way to it."""
    status = getattr(error, "status", None)
    return status is None or status in PASSING


def said(error: Exception) -> str:
    """The API's message, on one line."""
    body = getattr(error, "body", None)
    try:
        message = json.loads(body)["message"] if body else ""
    except (ValueError, KeyError, TypeError):
        message = ""
    status = getattr(error, "status", None)
    words = message or getattr(error, "reason", None) or error
    return " ".join(f"{status or type(error).__name__}: {words}".split())[:400]


def refusal(verb: str, resource: str, error: Exception) -> DesError:
    status = getattr(error, "status", 0)
    what = f"the cluster refused to {verb} {resource}"
    if status in (401, 403) and "exceeded quota" not in said(error):
        return UserError(
            f"{what} ({said(error)}); bind Role des-trainer to this account with a RoleBinding, "
            f"or grant verb {verb} on {resource}"
        )
    return UserError(f"{what} ({said(error)})")

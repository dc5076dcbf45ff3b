"""The only Kubernetes client: one training job, by four verbs.

    submit  whatever is there of this name, afterwards exactly this job runs, and belongs to this pod
    watch   its states until it has ended, through 410, 5xx, timeouts and cut connections
    logs    worker 0's lines as they are written
    delete  gone

``Jobs`` is what a step knows of a cluster; a backend of another kind of job (TrainJob) is another class with these
verbs. Entry rules of ``submit``: failed, finished or of another digest -> delete, wait until gone, create; active ->
adopt, and own anew, because garbage collection of a dead step's pod would take the job with it; being deleted ->
wait, create. A job lives in its step's namespace, for owners cannot be elsewhere.

A step needs ``RIGHTS``, which Role des-trainer grants.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from des_core.errors import ConfigError, DesError, UserError, WorkerError
from k8s.manifest import CONTAINER, DIGEST, GROUP, JOB_LABEL, PLURAL, VERSION, owners
from k8s.manifest import Job as Job
from k8s.manifest import render as render
from k8s.pods import Fallen, Trouble, fallen, trouble_of

TEMPLATE = "des-worker"

RIGHTS: dict[str, dict[str, tuple[str, ...]]] = {
    GROUP: {PLURAL: ("create", "delete", "get", "list", "patch", "watch")},
    "": {
        "events": ("list",),
        "persistentvolumeclaims": ("get",),
        "pods": ("get", "list"),
        "pods/log": ("get",),
        "podtemplates": ("get",),
    },
}
"""Verbs by API group and resource: all that this file asks for."""

PASSING = (429, 500, 502, 503, 504)
"""Statuses of a server that may soon answer."""

AWAY_S = 600.0
"""How long the API server may be away while a single answer is needed."""
GONE_S = 300.0
"""How long a job may take to go."""
WATCH_S = 60
"""Of one watch while all is well; at most 300."""
LOOK_S = 3
"""Of one watch while pods do not run, which only looking at them tells."""
LAST_LINES = 40
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")

Phase = Literal["queued", "waiting", "running", "succeeded", "failed", "deleted"]


@dataclass(frozen=True)
class State:
    """State of a job."""

    phase: Phase
    said: str = ""
    """The operator's word on an ended job, or why the cluster cannot be asked."""
    trouble: Trouble | None = None
    fallen: tuple[Fallen, ...] = ()
    """Of a failed job, its pods that failed, the first to fall first."""

    @property
    def ended(self) -> bool:
        return self.phase in ("succeeded", "failed", "deleted")

    @property
    def past_deadline(self) -> bool:
        """Whether the operator ended the job at its deadline, which the training operator tells in a message alone."""
        ended = self.said.startswith("DeadlineExceeded") or "active longer than specified deadline" in self.said
        return self.phase == "failed" and ended


class Jobs(Protocol):
    """A cluster, as a step knows it."""

    def submit(self, job: Job) -> None:
        """Make this job, and no other of its name, run and belong to this process's pod.

        Raises:
            UserError: the cluster refuses it, or what it needs is not there.
        """

    def watch(self, job: Job) -> Iterator[State]:
        """Its state now, after each change and at least every minute; the last one has ``ended``."""

    def logs(self, job: Job, ended: threading.Event) -> Iterator[str]:
        """Worker 0's lines, the first ones too, until the job has ``ended``."""

    def delete(self, job: Job, patience_s: float = AWAY_S) -> None:
        """Delete the job and its pods, if they exist."""


def in_pod() -> bool:
    """Whether this process runs in a cluster."""
    return bool(os.environ.get("KUBERNETES_SERVICE_HOST")) and (SERVICE_ACCOUNT / "token").exists()


def connect() -> PyTorchJobs:
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
        return PyTorchJobs(settings, here, pod)
    try:
        file = os.environ.get("KUBECONFIG")
        config.load_kube_config(config_file=file, client_configuration=settings)
        context = config.list_kube_config_contexts(config_file=file)[1]["context"]
    except config.ConfigException as error:
        raise ConfigError(
            f"cluster.backend = 'pytorchjob' needs a cluster, and there is none here ({error}); "
            "set KUBECONFIG, run inside a pod, or set cluster.backend = 'local'"
        ) from None
    return PyTorchJobs(settings, context.get("namespace", "default"))


class PyTorchJobs:
    """Jobs of the training operator, through its custom resource.

    Args:
        settings: a ``kubernetes.client.Configuration``.
        pod: name of this process's own pod, or empty outside a cluster.
    """

    def __init__(self, settings: Any, namespace: str, pod: str = "") -> None:
        from kubernetes import client

        # Ours are the only retries: they know what may be repeated.
        settings.retries = False
        api = client.ApiClient(settings)
        self._custom, self._core = client.CustomObjectsApi(api), client.CoreV1Api(api)
        self._namespace, self._pod = namespace, pod
        self._uid = ""

    def submit(self, job: Job) -> None:
        """As ``Jobs``."""
        template = self._read("podtemplates", TEMPLATE, self._core.read_namespaced_pod_template)
        job = self._at_home(job, template)
        manifest = render(template, job)
        started = time.monotonic()
        for pause_s in _pauses():
            if self._settle(job, manifest):
                return
            if time.monotonic() - started > GONE_S:
                break
            time.sleep(pause_s)
        raise WorkerError(
            f"job {job.name} is still being deleted after {GONE_S:.0f} s; see: "
            f"kubectl -n {self._namespace} get {PLURAL} {job.name} -o yaml (its finalizers)"
        )

    def watch(self, job: Job) -> Iterator[State]:
        """As ``Jobs``."""
        state, version, pauses = State("waiting"), "", _pauses()
        while True:
            try:
                if not version:
                    present, version = self._listed(job.name)
                    state = self._state(job, present)
                    yield state
                if state.ended:
                    return
                for kind, present in self._changes(job.name, version, state):
                    if kind == "ERROR":
                        # The version is too old (410), or the server is in trouble: begin with a list.
                        version = ""
                        break
                    version = present["metadata"]["resourceVersion"]
                    state = self._state(job, None if kind == "DELETED" else present)
                    yield state
                    if state.ended:
                        return
                    pauses = _pauses()
                else:
                    state = self._look(job, state)
                    yield state
                    continue
            except _failures() as error:
                if getattr(error, "status", 0) in (404, 410):
                    version = ""
                elif not _passes(error):
                    raise _refusal("watch", PLURAL, error) from None
                yield replace(state, said=f"the cluster does not answer ({_said(error)})")
            time.sleep(next(pauses))

    def logs(self, job: Job, ended: threading.Event) -> Iterator[str]:
        """As ``Jobs``."""
        newest, heard = "", 0.0
        while True:
            last = ended.is_set()
            more = {"since_seconds": int(time.monotonic() - heard) + 60} if heard else {}
            try:
                response = self._core.read_namespaced_pod_log(
                    *(f"{job.name}-worker-0", self._namespace),
                    container=CONTAINER,
                    follow=not last,
                    timestamps=True,
                    _preload_content=False,
                    _request_timeout=(10, 30),
                    **more,
                )
                for line in _lines(response):
                    stamp, _, text = line.partition(" ")
                    # What was read before a connection broke is sent again.
                    if _moment(stamp) > newest:
                        newest, heard = _moment(stamp), time.monotonic()
                        yield text
            except _failures() as error:
                if not _passes(error) and getattr(error, "status", 0) not in (400, 404):
                    yield f"the log of {job.name}-worker-0 cannot be read: {_said(error)}"
                    return
            if last:
                return
            ended.wait(1.0)

    def delete(self, job: Job, patience_s: float = AWAY_S) -> None:
        """As ``Jobs``."""
        delete = self._custom.delete_namespaced_custom_object
        options = {"propagationPolicy": "Background"}
        self._ask("delete", PLURAL, delete, *self._plural, job.name, body=options, patience_s=patience_s)

    @property
    def _plural(self) -> tuple[str, str, str, str]:
        return GROUP, VERSION, self._namespace, PLURAL

    def _settle(self, job: Job, manifest: Mapping[str, Any]) -> bool:
        """Whether the job is there as it should be, after one step towards it."""
        custom = self._custom
        present = self._ask("get", PLURAL, custom.get_namespaced_custom_object, *self._plural, job.name)
        if present is None:
            create = custom.create_namespaced_custom_object
            made = self._ask("create", PLURAL, create, *self._plural, body=manifest, lost=(409,))
            if made is None:
                raise UserError(
                    f"namespace {self._namespace} or its resource {PLURAL}.{GROUP} is not there; "
                    "install the Kubeflow training operator, and apply one of k8s/overlays"
                )
            self._uid = made.get("metadata", {}).get("uid", "")
            return bool(self._uid)
        metadata = present["metadata"]
        if metadata.get("deletionTimestamp"):
            return False
        same = metadata.get("annotations", {}).get(DIGEST) == manifest["metadata"]["annotations"][DIGEST]
        if not same or _phase(present) in ("succeeded", "failed"):
            self.delete(job)
            return False
        # A uid in a patch is a condition (409, or 422): no other job of this name is adopted.
        change = {"metadata": {"uid": metadata["uid"], "ownerReferences": owners(job.owner)}}
        patch = custom.patch_namespaced_custom_object
        patched = self._ask("patch", PLURAL, patch, *self._plural, job.name, body=change, lost=(409, 422))
        self._uid = metadata["uid"]
        return bool(patched)

    def _at_home(self, job: Job, template: Mapping[str, Any]) -> Job:
        """The job with its namespace and owner, and on this pod's node where their volume allows one node only.

        Raises:
            UserError: a volume claim is missing, or cannot be mounted by all pods.
        """
        me: Mapping[str, Any] = {}
        if self._pod:
            me = self._read("pods", self._pod, self._core.read_namespaced_pod)
            job = replace(job, owner=(me["metadata"]["name"], me["metadata"]["uid"]))
        here = set(_claims(me.get("spec", {})))
        for claim in _claims(template["template"]["spec"]):
            volume = self._read("persistentvolumeclaims", claim, self._core.read_namespaced_persistent_volume_claim)
            modes = set(volume["spec"]["accessModes"])
            if modes & {"ReadWriteMany", "ReadOnlyMany"}:
                continue
            shared = claim in here and "ReadWriteOnce" in modes
            if shared:
                job = replace(job, node=me["spec"]["nodeName"])
            elif job.nodes > 1 or claim in here:
                raise ConfigError(
                    f"volume claim {claim} is {', '.join(sorted(modes))}: one {'pod' if claim in here else 'node'} "
                    f"alone can mount it, and the job has cluster.nodes = {job.nodes}; use a ReadWriteMany claim, "
                    "storage.root on s3:// or gs:// without the claim, or cluster.nodes = 1"
                )
        return replace(job, namespace=self._namespace)

    def _read(self, resource: str, name: str, read: Callable[..., Any]) -> dict[str, Any]:
        """An object that must be there."""
        found = self._ask("get", resource, read, name, self._namespace)
        if found is None:
            raise UserError(
                f"{resource} {name} is not in namespace {self._namespace}; apply one of k8s/overlays to it, "
                f"or choose the namespace that has it"
            )
        return found

    def _ask(
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
            lost: statuses of a lost race, whose answer is empty.
        """
        until = time.monotonic() + patience_s
        for pause_s in _pauses():
            try:
                return self._once(verb, resource, call, *words, **more)
            except _failures() as error:
                if getattr(error, "status", 0) in lost:
                    return {}
                if not _passes(error):
                    raise _refusal(verb, resource, error) from None
                if time.monotonic() + pause_s > until:
                    raise WorkerError(f"the cluster has not answered for {patience_s:.0f} s: {_said(error)}") from None
            time.sleep(pause_s)
        raise AssertionError("pauses never end")

    def _once(
        self, verb: str, resource: str, call: Callable[..., Any], *words: str, **more: Any
    ) -> dict[str, Any] | None:
        """The answer to one request; None where there is no such thing.

        Raises:
            UserError: there is no right to it.
        """
        try:
            response = call(*words, _preload_content=False, _request_timeout=(10, 30), **more)
            answer: dict[str, Any] = json.loads(response.data)
            return answer
        except _failures() as error:
            status = getattr(error, "status", 0)
            if status == 404:
                return None
            if status in (401, 403):
                raise _refusal(verb, resource, error) from None
            raise

    def _listed(self, name: str) -> tuple[dict[str, Any] | None, str]:
        """The job, or None, and the version to watch from."""
        listing = self._custom.list_namespaced_custom_object
        found = self._once("list", PLURAL, listing, *self._plural, field_selector=f"metadata.name={name}")
        items = found["items"] if found else []
        return next(iter(items), None), found["metadata"]["resourceVersion"] if found else ""

    def _changes(self, name: str, version: str, state: State) -> Iterator[tuple[str, dict[str, Any]]]:
        """Kinds of change and the job after each, for a short while."""
        seconds = WATCH_S if state.phase == "running" and state.trouble is None else LOOK_S
        response = self._custom.list_namespaced_custom_object(
            *self._plural,
            field_selector=f"metadata.name={name}",
            resource_version=version,
            watch=True,
            timeout_seconds=seconds,
            _preload_content=False,
            _request_timeout=(10, seconds + 10),
        )
        for line in _lines(response):
            event = json.loads(line)
            yield event["type"], event["object"]

    def _state(self, job: Job, present: Mapping[str, Any] | None) -> State:
        """The state that an object shows; None or another of its name: it was deleted."""
        if present is None or (self._uid and present["metadata"]["uid"] != self._uid):
            return State("deleted", f"job {job.name} was deleted while it ran")
        state = State(_phase(present), _end_message(present))
        return self._look(job, state)

    def _look(self, job: Job, state: State) -> State:
        """The state with what the pods add to it."""
        if state.phase not in ("waiting", "running", "failed"):
            return state
        selector = f"{JOB_LABEL}={job.name}"
        answer = self._once("list", "pods", self._core.list_namespaced_pod, self._namespace, label_selector=selector)
        pods = answer["items"] if answer else []
        if state.phase == "failed":
            fell = sorted((one for one in map(fallen, pods) if one is not None), key=lambda one: one.ended)
            return replace(state, fallen=tuple(replace(one, lines=self._last_lines(one)) for one in fell))
        up = sum(pod.get("status", {}).get("phase") in ("Running", "Succeeded") for pod in pods)
        if up == job.nodes:
            return replace(state, trouble=None, said="")
        uids = {self._uid, *(pod["metadata"]["uid"] for pod in pods)}
        warnings = "type=Warning"
        listed = self._once(
            "list", "events", self._core.list_namespaced_event, self._namespace, field_selector=warnings
        )
        events = [event for event in (listed or {"items": []})["items"] if event["involvedObject"].get("uid") in uids]
        if len(pods) == job.nodes:
            # Once a quota was freed, its old complaints say nothing.
            events = [event for event in events if not event.get("reason", "").startswith("FailedCreate")]
        return replace(state, trouble=trouble_of(pods, events), said="")

    def _last_lines(self, one: Fallen) -> tuple[str, ...]:
        try:
            response = self._core.read_namespaced_pod_log(
                *(one.pod, self._namespace),
                container=CONTAINER,
                tail_lines=LAST_LINES,
                _preload_content=False,
                _request_timeout=(10, 30),
            )
            return tuple(_lines(response))
        except _failures():
            # Its node may be gone, and its log with it; the status has a few lines.
            return one.lines


def _phase(present: Mapping[str, Any]) -> Phase:
    status = present.get("status") or {}
    true = {one["type"] for one in status.get("conditions") or [] if one["status"] == "True"}
    if "Failed" in true:
        return "failed"
    if "Succeeded" in true:
        return "succeeded"
    if present["spec"].get("runPolicy", {}).get("suspend") or "Suspended" in true:
        return "queued"
    return "running" if "Running" in true else "waiting"


def _end_message(present: Mapping[str, Any]) -> str:
    """The operator's message about an ended job."""
    conditions = (present.get("status") or {}).get("conditions") or []
    ends = [one for one in conditions if one["type"] in ("Failed", "Succeeded") and one["status"] == "True"]
    return next((f"{one.get('reason', '')}: {one.get('message', '')}" for one in ends), "")


def _claims(spec: Mapping[str, Any]) -> list[str]:
    volumes = spec.get("volumes") or []
    return [volume["persistentVolumeClaim"]["claimName"] for volume in volumes if "persistentVolumeClaim" in volume]


def _pauses() -> Iterator[float]:
    """Seconds between attempts, ever longer, without end."""
    pause_s = 0.2
    while True:
        yield pause_s
        pause_s = min(30.0, 2 * pause_s)


def _lines(response: Any) -> Iterator[str]:
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


def _moment(stamp: str) -> str:
    """A log line's time as text that sorts: its fraction has no fixed width."""
    found = re.match(r"(\S{19})(?:\.(\d+))?", stamp)
    return f"{found[1]}.{found[2] or '':0<9}" if found else ""


def _failures() -> tuple[type[Exception], ...]:
    """What a request may raise."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    return ApiException, HTTPError, OSError, json.JSONDecodeError


def _passes(error: Exception) -> bool:
    """Whether a request may be repeated: the server is in trouble, or the way to it."""
    status = getattr(error, "status", None)
    return status is None or status in PASSING


def _said(error: Exception) -> str:
    """The API's message, on one line."""
    body = getattr(error, "body", None)
    try:
        said = json.loads(body)["message"] if body else ""
    except (ValueError, KeyError, TypeError):
        said = ""
    status = getattr(error, "status", None)
    words = said or getattr(error, "reason", None) or error
    return " ".join(f"{status or type(error).__name__}: {words}".split())[:400]


def _refusal(verb: str, resource: str, error: Exception) -> DesError:
    status = getattr(error, "status", 0)
    what = f"the cluster refused to {verb} {resource}"
    if status in (401, 403) and "exceeded quota" not in _said(error):
        return UserError(
            f"{what} ({_said(error)}); bind Role des-trainer to this account with a RoleBinding, "
            f"or grant verb {verb} on {resource}"
        )
    return UserError(f"{what} ({_said(error)})")

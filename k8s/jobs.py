"""Jobs of a Kubernetes operator, by four verbs: one client for every kind of job (pytorch.py, ray.py).

    submit  afterwards exactly this job runs, and belongs to this process's pod, whatever was there of its name
    watch   its states until it has ended, through answers 410 and 5xx, timeouts and broken connections
    logs    the lines of the pod that reports progress, as they are written
    delete  the job and its pods

``Jobs`` is what a step knows of a cluster. Rules of ``submit``: a job that has failed or finished, or that has another
digest, is deleted, waited for until it is gone, and created; an active one is adopted and given this pod as its owner,
because garbage collection of a dead step's pod would delete the job with it; one that is being deleted is waited for,
then created. A job lives in its step's namespace, because Kubernetes allows no owner in another.

A step needs ``RIGHTS``, which Role des-trainer grants.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from des_core.errors import ConfigError, UserError, WorkerError
from k8s import api as requests
from k8s.api import AWAY_S, Api, failures, lines, passes, pauses, refusal, said
from k8s.api import in_pod as in_pod
from k8s.manifest import DIGEST, Kind, Phase, owners, render
from k8s.manifest import Job as Job
from k8s.pods import Fallen, Trouble, fallen, trouble_of
from k8s.pytorch import PYTORCH
from k8s.ray import RAY

RIGHTS: dict[str, dict[str, tuple[str, ...]]] = {
    **{kind.group: {kind.plural: ("create", "delete", "get", "list", "patch", "watch")} for kind in (PYTORCH, RAY)},
    "": {
        "events": ("list",),
        "persistentvolumeclaims": ("get",),
        "pods": ("get", "list"),
        "pods/log": ("get",),
        "podtemplates": ("get",),
    },
}
"""Verbs by API group and resource: all that this file asks for."""

GONE_S = 300.0
"""How long the deletion of a job may take."""
WATCH_S = 60
"""Seconds of one watch of a job whose pods all run; at most 300."""
LOOK_S = 3
"""Seconds of one watch otherwise: why pods do not run is seen only by looking at them."""
LAST_LINES = 40


@dataclass(frozen=True)
class State:
    """State of a job."""

    phase: Phase
    said: str = ""
    """The operator's message about an ended job, or why the cluster does not answer."""
    trouble: Trouble | None = None
    fallen: tuple[Fallen, ...] = ()
    """Of a failed job, its failed pods, in the order in which they failed."""

    @property
    def ended(self) -> bool:
        return self.phase in ("succeeded", "failed", "deleted")

    @property
    def past_deadline(self) -> bool:
        """Whether the operator ended the job at its deadline; the training operator says so in a message only."""
        ended = self.said.startswith("DeadlineExceeded") or "active longer than specified deadline" in self.said
        return self.phase == "failed" and ended


class Jobs(Protocol):
    """A cluster, as a step knows it."""

    def submit(self, job: Job) -> None:
        """Make this job, and no other of its name, run, with this process's pod as its owner.

        Raises:
            UserError: the cluster refuses it, or something that it needs does not exist.
        """

    def watch(self, job: Job) -> Iterator[State]:
        """Its state now, after each change and at least every minute; the last one has ``ended``."""

    def logs(self, job: Job, ended: threading.Event) -> Iterator[str]:
        """The lines of the pod that reports progress, from the first one on, until the job has ``ended``."""

    def delete(self, job: Job, patience_s: float = AWAY_S) -> None:
        """Delete the job and its pods, if they exist."""


def connect(kind: Kind = PYTORCH) -> OperatorJobs:
    """Jobs of a kind on the cluster that ``api.connect`` finds; raises as that does."""
    return OperatorJobs(requests.connect(), kind)


class OperatorJobs:
    """Jobs of one kind, through the custom resource of its operator."""

    def __init__(self, api: Api, kind: Kind = PYTORCH) -> None:
        self._api, self._kind = api, kind
        self._custom, self._core = api.custom, api.core
        self._namespace = api.namespace
        self._uid = ""

    def submit(self, job: Job) -> None:
        """As ``Jobs``."""
        template = self._api.read("podtemplates", self._kind.template, self._core.read_namespaced_pod_template)
        job = self._placed(job, template)
        manifest = render(self._kind, template, job)
        started = time.monotonic()
        for pause_s in pauses():
            if self._settle(job, manifest):
                return
            if time.monotonic() - started > GONE_S:
                break
            time.sleep(pause_s)
        raise WorkerError(
            f"job {job.name} is still being deleted after {GONE_S:.0f} s; see: "
            f"kubectl -n {self._namespace} get {self._kind.plural} {job.name} -o yaml (its finalizers)"
        )

    def watch(self, job: Job) -> Iterator[State]:
        """As ``Jobs``."""
        state, version, waits = State("waiting"), "", pauses()
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
                    waits = pauses()
                else:
                    state = self._look(job, state)
                    yield state
                    continue
            except failures() as error:
                if getattr(error, "status", 0) in (404, 410):
                    version = ""
                elif not passes(error):
                    raise refusal("watch", self._kind.plural, error) from None
                yield replace(state, said=f"the cluster does not answer ({said(error)})")
            time.sleep(next(waits))

    def logs(self, job: Job, ended: threading.Event) -> Iterator[str]:
        """As ``Jobs``."""
        newest, heard = "", 0.0
        while True:
            last = ended.is_set()
            pod = self._kind.log_pod(job) or self._newest(self._kind.log_selector(job))
            if not pod and not last:
                ended.wait(1.0)
                continue
            if not pod:
                return
            more = {"since_seconds": int(time.monotonic() - heard) + 60} if heard else {}
            try:
                response = self._core.read_namespaced_pod_log(
                    *(pod, self._namespace),
                    container=self._kind.container,
                    follow=not last,
                    timestamps=True,
                    _preload_content=False,
                    _request_timeout=(10, 30),
                    **more,
                )
                for line in lines(response):
                    stamp, _, text = line.partition(" ")
                    # What was read before a connection broke is sent again.
                    if _moment(stamp) > newest:
                        newest, heard = _moment(stamp), time.monotonic()
                        yield text
            except failures() as error:
                if not passes(error) and getattr(error, "status", 0) not in (400, 404):
                    yield f"the log of {pod} cannot be read: {said(error)}"
                    return
            if last:
                return
            ended.wait(1.0)

    def delete(self, job: Job, patience_s: float = AWAY_S) -> None:
        """As ``Jobs``."""
        delete = self._custom.delete_namespaced_custom_object
        options = {"propagationPolicy": "Background"}
        self._api.ask("delete", self._kind.plural, delete, *self._plural, job.name, body=options, patience_s=patience_s)

    @property
    def _plural(self) -> tuple[str, str, str, str]:
        return self._kind.group, self._kind.version, self._namespace, self._kind.plural

    def _settle(self, job: Job, manifest: Mapping[str, Any]) -> bool:
        """Whether the job is there as it should be, after one step towards it."""
        custom = self._custom
        present = self._api.ask("get", self._kind.plural, custom.get_namespaced_custom_object, *self._plural, job.name)
        if present is None:
            create = custom.create_namespaced_custom_object
            made = self._api.ask("create", self._kind.plural, create, *self._plural, body=manifest, lost=(409,))
            if made is None:
                raise UserError(
                    f"namespace {self._namespace} or its resource {self._kind.plural}.{self._kind.group} does not "
                    f"exist; install {self._kind.operator}, and apply one of k8s/overlays"
                )
            self._uid = made.get("metadata", {}).get("uid", "")
            return bool(self._uid)
        metadata = present["metadata"]
        if metadata.get("deletionTimestamp"):
            return False
        same = metadata.get("annotations", {}).get(DIGEST) == manifest["metadata"]["annotations"][DIGEST]
        if not same or self._kind.phase(present) in ("succeeded", "failed"):
            self.delete(job)
            return False
        # A uid in a patch is a condition (409, or 422): no other job of this name is adopted.
        change = {"metadata": {"uid": metadata["uid"], "ownerReferences": owners(job.owner)}}
        patch = custom.patch_namespaced_custom_object
        patched = self._api.ask(
            "patch", self._kind.plural, patch, *self._plural, job.name, body=change, lost=(409, 422)
        )
        self._uid = metadata["uid"]
        return bool(patched)

    def _placed(self, job: Job, template: Mapping[str, Any]) -> Job:
        """The job with its namespace and owner, and on this pod's node where their volume allows one node only.

        Raises:
            UserError: a volume claim is missing, or cannot be mounted by all pods.
        """
        me: Mapping[str, Any] = {}
        if self._api.pod:
            me = self._api.read("pods", self._api.pod, self._core.read_namespaced_pod)
            job = replace(job, owner=(me["metadata"]["name"], me["metadata"]["uid"]))
        here = set(_claims(me.get("spec", {})))
        for claim in _claims(template["template"]["spec"]):
            volume = self._api.read("persistentvolumeclaims", claim, self._core.read_namespaced_persistent_volume_claim)
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

    def _newest(self, selector: str) -> str:
        """Name of the youngest pod that a selector finds, or nothing."""
        found = self._api.ask("list", "pods", self._core.list_namespaced_pod, self._namespace, label_selector=selector)
        pods: list[dict[str, Any]] = found["items"] if found else []
        youngest = sorted(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp") or ""))[-1:]
        return next((str(pod["metadata"]["name"]) for pod in youngest), "")

    def _listed(self, name: str) -> tuple[dict[str, Any] | None, str]:
        """The job, or None, and the version to watch from."""
        listing = self._custom.list_namespaced_custom_object
        found = self._api.once(
            "list", self._kind.plural, listing, *self._plural, field_selector=f"metadata.name={name}"
        )
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
        for line in lines(response):
            event = json.loads(line)
            yield event["type"], event["object"]

    def _state(self, job: Job, present: Mapping[str, Any] | None) -> State:
        """The state that an object shows; None or another of its name: it was deleted."""
        if present is None or (self._uid and present["metadata"]["uid"] != self._uid):
            return State("deleted", f"job {job.name} was deleted while it ran")
        state = State(self._kind.phase(present), self._kind.end_message(present))
        return self._look(job, state)

    def _look(self, job: Job, state: State) -> State:
        """The state with what the pods add to it."""
        if state.phase not in ("waiting", "running", "failed"):
            return state
        selector = self._kind.selector(job)
        answer = self._api.once(
            "list", "pods", self._core.list_namespaced_pod, self._namespace, label_selector=selector
        )
        pods = answer["items"] if answer else []
        if state.phase == "failed":
            fell = sorted((one for one in map(fallen, pods) if one is not None), key=lambda one: one.ended)
            return replace(state, fallen=tuple(replace(one, lines=self._last_lines(one)) for one in fell))
        up = sum(pod.get("status", {}).get("phase") in ("Running", "Succeeded") for pod in pods)
        if up >= self._kind.pods(job):
            return replace(state, trouble=None, said="")
        uids = {self._uid, *(pod["metadata"]["uid"] for pod in pods)}
        warnings = "type=Warning"
        listed = self._api.once(
            "list", "events", self._core.list_namespaced_event, self._namespace, field_selector=warnings
        )
        events = [event for event in (listed or {"items": []})["items"] if event["involvedObject"].get("uid") in uids]
        if len(pods) >= self._kind.pods(job):
            # All pods exist: older events about pods that could not be created no longer matter.
            events = [event for event in events if not event.get("reason", "").startswith("FailedCreate")]
        return replace(state, trouble=trouble_of(pods, events), said="")

    def _last_lines(self, one: Fallen) -> tuple[str, ...]:
        try:
            response = self._core.read_namespaced_pod_log(
                *(one.pod, self._namespace),
                container=self._kind.container,
                tail_lines=LAST_LINES,
                _preload_content=False,
                _request_timeout=(10, 30),
            )
            return tuple(lines(response))
        except failures():
            # Its node may be gone, and its log with it; the status has a few lines.
            return one.lines


def _claims(spec: Mapping[str, Any]) -> list[str]:
    volumes = spec.get("volumes") or []
    return [volume["persistentVolumeClaim"]["claimName"] for volume in volumes if "persistentVolumeClaim" in volume]


def _moment(stamp: str) -> str:
    """A log line's time as text that sorts: its fraction has no fixed width."""
    found = re.match(r"(\S{19})(?:\.(\d+))?", stamp)
    return f"{found[1]}.{found[2] or '':0<9}" if found else ""

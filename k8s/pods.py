"""Why a job's pods do not start, and why they failed, read from the JSON of its pods and events.

Nothing here sends a request to the cluster.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Object = Mapping[str, Any]

LASTING = (
    "CreateContainerConfigError",
    "CreateContainerError",
    "ErrImageNeverPull",
    "ErrImagePull",
    "ImageInspectError",
    "ImagePullBackOff",
    "InvalidImageName",
    "RunContainerError",
)
"""Reasons for which a container waits that seldom go away by themselves."""


@dataclass(frozen=True)
class Trouble:
    """Why a job's pods do not all run."""

    reason: str
    message: str
    lasting: bool
    """Whether it will hardly go away by itself."""

    def __str__(self) -> str:
        return f"{self.reason}: {' '.join(self.message.split())[:400]}"


@dataclass(frozen=True)
class Fallen:
    """A pod that failed."""

    pod: str
    reason: str
    """OOMKilled, Evicted ... or Error."""
    message: str
    code: int
    """Exit code; -1 where no container ended."""
    ended: str
    """When it failed, as text that sorts; the pod that failed first is the likeliest cause."""
    lines: tuple[str, ...] = ()
    """Its last lines."""


def trouble_of(pods: Iterable[Object], events: Iterable[Object]) -> Trouble | None:
    """The most serious reason why pods do not run: lasting ones first."""
    found = [trouble for pod in pods for trouble in _pod_trouble(pod)]
    found += [trouble for event in events for trouble in _event_trouble(event)]
    return min(found, key=lambda trouble: not trouble.lasting, default=None)


def _pod_trouble(pod: Object) -> Iterable[Trouble]:
    status = pod.get("status", {})
    name = pod["metadata"]["name"]
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            reason = condition.get("reason", "Unschedulable")
            yield Trouble(reason, f"{name}: {condition.get('message', '')}", lasting=False)
    for container in status.get("containerStatuses", []):
        waiting = container.get("state", {}).get("waiting", {})
        if waiting.get("reason") in LASTING:
            image = container.get("image", "")
            yield Trouble(waiting["reason"], f"{name} ({image}): {waiting.get('message', '')}", lasting=True)


def _event_trouble(event: Object) -> Iterable[Trouble]:
    reason, message = event.get("reason", ""), event.get("message", "")
    if event.get("type") != "Warning":
        return
    if reason.startswith("FailedCreate"):
        # Others may free a quota; what an admission rule forbids stays forbidden.
        quota = "exceeded quota" in message
        yield Trouble("quota exceeded" if quota else reason, message, lasting=not quota and "forbidden" in message)
    elif reason in ("FailedMount", "FailedAttachVolume"):
        yield Trouble(reason, message, lasting=False)


def fallen(pod: Object) -> Fallen | None:
    """The failure of a pod, None if it has not failed."""
    status, name = pod.get("status", {}), pod["metadata"]["name"]
    ends = [_end(container) for container in status.get("containerStatuses", [])]
    end: Object = next((end for end in ends if end and end.get("exitCode")), {})
    disrupted: Object = next(
        (
            condition
            for condition in status.get("conditions", [])
            if condition["type"] == "DisruptionTarget" and condition["status"] == "True"
        ),
        {},
    )
    if status.get("phase") != "Failed" and not end:
        return None
    reason = status.get("reason") or disrupted.get("reason") or end.get("reason") or "Error"
    message = status.get("message") or disrupted.get("message") or ""
    lines = tuple(end.get("message", "").splitlines())
    return Fallen(name, reason, message, int(end.get("exitCode", -1)), end.get("finishedAt") or "", lines)


def _end(container: Object) -> Object:
    """How a container ended: its present state, or the last one before it was restarted."""
    state, last = container.get("state", {}), container.get("lastState", {})
    ended: Object = state.get("terminated") or last.get("terminated") or {}
    return ended

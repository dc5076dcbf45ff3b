"""Why a job on a cluster failed, as one error of one line."""

from __future__ import annotations

import signal

from components.launch.failure import launch_error
from components.launch.job_log import JobLog, Outcome
from des_core import log
from des_core.config import ClusterConfig
from des_core.errors import (
    DeadlineError,
    DesError,
    KilledError,
    OutOfMemoryError,
    PeerLostError,
    UserError,
    WorkerError,
    error_of,
)
from k8s.jobs import Job, State

KILLED = 128 + signal.SIGKILL
"""Exit code of a container that was killed."""


def job_error(job: Job, state: State, cluster: ClusterConfig, job_log: JobLog) -> DesError:
    """The error of a job without a result: a user's mistake, else the pod's end, else the workers' last message."""
    if state.phase == "succeeded":
        return WorkerError(
            f"job {job.name} succeeded, but left no {job_log.outcome.result}; "
            "do this step and the job's pods mount the same storage.root?"
        )
    output = "\n".join([*(line for one in state.fallen for line in one.lines), *job_log.lines])
    events = [event for event in map(log.parse_event, output.splitlines()) if event.get("event") == "error"]
    errors = [error_of(event.get("code", ""), event.get("message", "")) for event in events]
    mistake = next((error for error in errors if isinstance(error, UserError)), None)
    if mistake:
        return mistake
    if state.phase == "deleted":
        return WorkerError(f"{state.said}; {job_log.where}")
    if state.past_deadline:
        return DeadlineError(
            f"job {job.name} ran for more than cluster.deadline_s = {cluster.deadline_s:g} {job_log.where}"
        )
    return _pod_error(job, state, errors, job_log.outcome, job_log.where) or _last_words(
        job, state, errors, output, job_log.where
    )


def _pod_error(job: Job, state: State, errors: list[DesError], outcome: Outcome, where: str) -> DesError | None:
    """The error that Kubernetes reports, if it is the cause."""
    # A pod whose end has a name is the cause; others end because of it.
    pod = next((one for one in state.fallen if one.reason not in ("Error", "Completed")), None)
    if pod and pod.reason == "OOMKilled":
        return OutOfMemoryError(
            f"pod {pod.pod} was killed (OOMKilled) {where}; its {job.memory} of memory ({outcome.memory_from}) "
            "were not enough: set more, or use more workers"
        )
    if pod:
        said = ": ".join(filter(None, [pod.reason, pod.message]))
        return WorkerError(f"pod {pod.pod} ended ({said[:300]}) {where}")
    killed = next((one for one in state.fallen if one.code == KILLED), None)
    if killed and all(isinstance(error, PeerLostError) for error in errors):
        return KilledError(f"pod {killed.pod} was killed (exit code {KILLED}) {where}")
    return None


def _last_words(job: Job, state: State, errors: list[DesError], output: str, where: str) -> DesError:
    """The error that the workers reported, else the last line of a pod, else the operator's message."""
    # A worker that lost a peer often tells of it sooner than the peer tells of its own end.
    cause = next((error for error in errors if not isinstance(error, PeerLostError)), errors[0] if errors else None)
    error = launch_error({"code": cause.code, "message": str(cause)} if cause else None, output, where)
    if error:
        return error
    lines = (f"{one.pod}: {line.strip()}" for one in state.fallen for line in reversed(one.lines) if line.strip())
    last = next(lines, " ".join(state.said.split()))
    return WorkerError(f"job {job.name} failed ({last[:300]}) {where}")

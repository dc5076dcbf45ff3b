"""Runs one job on a cluster until its result is in storage, by the same rules for every kind of job.

    submit (or adopt) -> watch + log -> the result in storage

What counts is the result in storage, not the job's condition. A step that receives SIGTERM or SIGINT deletes its job;
one that is killed leaves the job to its next attempt, which adopts it, or to Kubernetes' garbage collection.
"""

from __future__ import annotations

import signal
import threading
import time
from contextlib import suppress

from components.launch.job_failure import job_error
from components.launch.job_log import JobLog, Outcome
from components.launch.process_tie import told_to_end
from components.launch.progress import Progress
from components.launch.roles import LEAVE_S, pace
from des_core import log
from des_core.config import ClusterConfig
from des_core.errors import DeadlineError, DesError, PodStartError, QueueTimeoutError, WorkerError
from k8s.jobs import Job, Jobs, State

STUCK_S = 120.0
"""How long a trouble that seldom passes by itself is waited for, such as an image that cannot be pulled."""
TELL_S = 60.0
"""Between two lines about the same wait."""
SEEN_S, LOOK_S = 20.0, 0.2
"""How long a result may take to be seen on a shared volume, and the time between two looks."""
GRACE_S = 15.0
"""For the deletion of a job by a step that was told to end; Kubernetes kills it after 30 s."""
LATE_S = 60.0
"""The operator ends a job at its deadline; this much later we do."""


def run_job(jobs: Jobs, job: Job, cluster: ClusterConfig, outcome: Outcome) -> None:
    """Run a job until it has left its result.

    Raises:
        DesError: it failed, was deleted or took too long; UserError where it is the user's to mend.
    """
    with told_to_end(), Progress(pace()) as progress:
        job_log = JobLog(outcome, progress)
        try:
            jobs.submit(job)
            log.emit("job", name=job.name, nodes=job.nodes, nproc_per_node=job.nproc_per_node, image=job.image)
            state = _follow(jobs, job, cluster, job_log)
        except (KeyboardInterrupt, SystemExit, BrokenPipeError):
            # A pipe breaks when whoever runs this step is gone.
            _let_go(jobs, job)
            raise
        finally:
            job_log.keep()
        # A volume of another node, or an object store, may show a file late.
        until = time.monotonic() + (SEEN_S if state.phase == "succeeded" else 0.0)
        while not outcome.finished():
            if time.monotonic() >= until:
                raise job_error(job, state, cluster, job_log)
            time.sleep(LOOK_S)


def _follow(jobs: Jobs, job: Job, cluster: ClusterConfig, job_log: JobLog) -> State:
    """The job's last state; its log is shown meanwhile.

    Raises:
        WorkerError: it waited or ran for too long, and was deleted.
    """
    ended = threading.Event()

    def listen() -> None:
        for line in jobs.logs(job, ended):
            job_log.add_line(line)

    thread = threading.Thread(target=listen, daemon=True, name="job-log")
    thread.start()
    try:
        return _wait(jobs, job, cluster, job_log)
    finally:
        ended.set()
        thread.join(GRACE_S)


def _wait(jobs: Jobs, job: Job, cluster: ClusterConfig, job_log: JobLog) -> State:
    """The job's last state. Time in a queue does not count against the deadline.

    Raises:
        WorkerError: it took too long, and was deleted.
    """
    before, last = State("waiting"), time.monotonic()
    spent_s = {"queued": 0.0, "active": 0.0, "passing": 0.0, "lasting": 0.0}
    told = -TELL_S
    for state in jobs.watch(job):
        now = time.monotonic()
        passed_s, last = now - last, now
        spent_s["queued" if before.phase == "queued" else "active"] += passed_s
        _add_trouble(spent_s, before, state, passed_s)
        if state.ended:
            return state
        if job_log.left_at and now - job_log.left_at > LEAVE_S and job_log.outcome.finished():
            # All workers have met for the last time; one is frozen on its way out.
            log.emit("left", job=job.name, why="its work is done, and a worker has not ended; the job is deleted")
            jobs.delete(job)
            return State("succeeded", "its work was done")
        if state.phase != before.phase or _name(state) != _name(before):
            told = -TELL_S
        before = state
        waits = _waits(job, state, spent_s)
        if waits and now - told >= TELL_S:
            told = now
            log.emit("waiting", job=job.name, why=waits, limit_s=round(_limit_s(state, cluster)))
        exceeded = _limit_exceeded(job, state, cluster, spent_s, job_log.where)
        if exceeded is not None:
            jobs.delete(job)
            raise exceeded
    raise WorkerError(f"job {job.name} is no longer watched; {job_log.where}")


def _add_trouble(spent_s: dict[str, float], before: State, state: State, passed_s: float) -> None:
    """Add the time since the state before to what pods have spent in trouble.

    One lasting trouble goes by several names in turn (ErrImagePull, ImagePullBackOff), so its time adds up until the
    pods run; one that passes begins anew each time.
    """
    if before.trouble is not None:
        spent_s["lasting" if before.trouble.lasting else "passing"] += passed_s
    if state.trouble is None or state.trouble.lasting:
        spent_s["passing"] = 0.0
    if state.trouble is None and state.phase == "running" and not state.said:
        spent_s["lasting"] = 0.0


def _name(state: State) -> str:
    """A trouble's name for log lines; a lasting one may change its reason every few seconds."""
    if state.trouble is None:
        return ""
    return "lasting" if state.trouble.lasting else state.trouble.reason


def _limit_s(state: State, cluster: ClusterConfig) -> float:
    """Seconds after which a job that waits for this is given up."""
    lasting = state.phase != "queued" and state.trouble is not None and state.trouble.lasting
    return min(STUCK_S, cluster.queue_timeout_s) if lasting else cluster.queue_timeout_s


def _waits(job: Job, state: State, spent_s: dict[str, float]) -> str:
    """What a job that does not run waits for."""
    if state.said:
        return state.said
    if state.phase == "queued":
        return f"waiting in queue {job.queue} for {spent_s['queued']:.0f} s"
    return f"{state.trouble}" if state.trouble else ""


def _limit_exceeded(
    job: Job, state: State, cluster: ClusterConfig, spent_s: dict[str, float], where: str
) -> WorkerError | None:
    """Why a job is not waited for any longer; None: it is."""
    limit_s, trouble = cluster.queue_timeout_s, state.trouble
    if state.phase == "queued" and spent_s["queued"] > limit_s:
        return QueueTimeoutError(
            f"job {job.name} was deleted after waiting in queue {job.queue} for {spent_s['queued']:.0f} s "
            f"(cluster.queue_timeout_s = {limit_s:g}); raise it, or ask the queue's owner for room"
        )
    in_trouble_s = spent_s["lasting" if trouble and trouble.lasting else "passing"]
    if trouble and in_trouble_s > _limit_s(state, cluster):
        held = f" (its volume can be mounted on node {job.node} only)" if job.node else ""
        return PodStartError(
            f"job {job.name} was deleted: its pods could not start for {in_trouble_s:.0f} s: {trouble}{held}; "
            "ask for less in [cluster] cpu, memory, gpus or nodes, or mend what it names"
        )
    if state.phase != "queued" and spent_s["active"] > cluster.deadline_s + LATE_S:
        return DeadlineError(
            f"job {job.name} ran for more than cluster.deadline_s = {cluster.deadline_s:g} and was deleted; {where}"
        )
    return None


def _let_go(jobs: Jobs, job: Job) -> None:
    """Delete the job of a step that received a signal; a second signal does not interrupt this."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    why = "this step was told to end"
    try:
        jobs.delete(job, GRACE_S)
        event = "deleted"
    except DesError as error:
        event, why = "left", str(error)
    with suppress(BrokenPipeError):
        log.emit(event, job=job.name, why=why)

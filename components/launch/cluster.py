"""Runs N workers as one job on a cluster, and explains in one line why a job failed (cluster.backend = "pytorchjob").

    render inputs -> submit (or adopt) -> watch + worker 0's log -> the result's manifest in storage

What counts is the manifest in storage, not the job's condition. A step that is told to end (SIGTERM, SIGINT) takes its
job with it; one that is killed leaves it to its next attempt, which adopts it, or to garbage collection.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress

from components.launch.environment import THREADS, image_of
from components.launch.failure import launch_error
from components.launch.memory import pod_memory
from components.launch.process_tie import told_to_end
from components.launch.progress import Progress
from components.launch.roles import LEAVE_S, LEAVING, MODULES, Role, pace
from des_core import log, storage
from des_core.config import ClusterConfig, Config
from des_core.errors import (
    ConfigError,
    DeadlineError,
    DesError,
    KilledError,
    OutOfMemoryError,
    PeerLostError,
    PodStartError,
    QueueTimeoutError,
    UserError,
    WorkerError,
    error_of,
)
from des_core.run import PROFILE, Run
from des_core.secrets import hidden
from k8s.jobs import Job, Jobs, State, connect, in_pod

RESULTS: dict[str, tuple[str, ...]] = {
    "train": ("training.json",),
    "evaluate": ("predictions/_manifest.json", "report.json"),
    "score": ("score-found.json",),
}
"""What a role has written when it is done, beside its answer where it was asked to compare."""

STUCK_S = 120.0
"""How long a trouble that seldom passes by itself is waited for, such as an image that cannot be pulled."""
TELL_S = 60.0
"""Between two lines about the same wait."""
SEEN_S = 20.0
"""How long a result may take to be seen on a shared volume."""
GRACE_S = 15.0
"""For the deletion of a job by a step that was told to end; Kubernetes kills it after 30 s."""
KILLED = 128 + signal.SIGKILL
"""Exit code of a container that was killed."""
LATE_S = 60.0
"""The operator ends a job at its deadline; this much later we do."""


def launch(role: Role, run: Run, resume: bool = False, module: str = "", jobs: Jobs | None = None) -> None:
    """Run a role as one job of ``cluster.nodes`` pods until its result is in storage.

    Args:
        module: the workers' module, if not the role's own.
        jobs: the cluster; by default the one that this process is in.

    Raises:
        DesError: the job failed, was deleted or took too long; UserError where it is the user's to mend.
    """
    if _finished(role, run):
        return
    config = run.config
    check(config)
    jobs = jobs or connect()
    job = job_of(role, run, resume, module)
    with told_to_end(), Progress(pace()) as progress:
        job_log = _JobLog(run, role, progress)
        try:
            jobs.submit(job)
            log.emit("job", name=job.name, nodes=job.nodes, nproc_per_node=job.nproc_per_node, image=job.image)
            state = _follow(jobs, job, config.cluster, job_log)
        except (KeyboardInterrupt, SystemExit, BrokenPipeError):
            # A pipe breaks when whoever runs this step is gone.
            _let_go(jobs, job)
            raise
        finally:
            job_log.keep()
        # A volume of another node, or an object store, may show a file late.
        until = time.monotonic() + (SEEN_S if state.phase == "succeeded" else 0.0)
        while not _finished(role, run):
            if time.monotonic() >= until:
                raise _job_error(job, state, config.cluster, job_log)
            time.sleep(0.2)


def check(config: Config) -> None:
    """Nothing, if this process can hand work to a cluster.

    Raises:
        ConfigError: no usable image, or a storage.root that only this machine can reach.
    """
    image_of(config)
    root = config.storage.root
    if hidden(root) != root:
        raise ConfigError(
            f"storage.root = {hidden(root)!r} holds a password, which is not written where workers would "
            "read it; give it to PodTemplate des-worker as a secret, like AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if not in_pod() and "://" not in root:
        raise ConfigError(
            f"storage.root = {root!r} is a folder of this machine, which the job's pods cannot see; "
            "set it to an address like s3://bucket/folder, or start inside a pod that mounts the volume"
        )


def job_of(role: Role, run: Run, resume: bool = False, module: str = "") -> Job:
    """What this role of a run asks of the cluster."""
    cluster = run.config.cluster
    cpus = float(cluster.cpu.removesuffix("m")) / (1000 if cluster.cpu.endswith("m") else 1)
    # One CPU of a share of several is for the thread that prepares the next batch.
    threads = str(max(1, int(cpus) // cluster.nproc_per_node - 1))
    name = f"{run.config.run.name[:30]}-{run.key[:10]}"
    return Job(
        name=name if role == "train" else f"{name}-{role}",
        image=image_of(run.config),
        command=(
            *("torchrun", "-m", module or MODULES[role]),
            *("--config", run.path("inputs.json"), "--dataset", str(run.dataset)),
        ),
        flags=("--resume",) * resume,
        env=dict.fromkeys(THREADS, threads)
        | {"PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}
        | {name: value for name, value in os.environ.items() if name == PROFILE},
        nodes=cluster.nodes,
        nproc_per_node=cluster.nproc_per_node,
        cpu=cluster.cpu,
        memory=pod_memory(run),
        gpus=cluster.gpus,
        deadline_s=cluster.deadline_s,
        queue=cluster.queue,
        elastic=cluster.elastic,
        labels={"des/run": run.config.run.name[:63].rstrip("-"), "des/run-key": run.key[:12], "des/role": role},
    )


class _JobLog:
    """Worker 0's log lines: shown as they arrive, and written beside the run's results."""

    def __init__(self, run: Run, role: str, progress: Progress) -> None:
        self.run, self.role, self._progress = run, role, progress
        self.path = run.path(f"{role}.log")
        self.step = 0
        self.left_at = 0.0
        """When worker 0 said that all is done, by the monotonic clock; 0: it has not."""
        self.lines: list[str] = []

    def add_line(self, line: str) -> None:
        """Take one line."""
        self.lines.append(line)
        event = log.parse_event(line.strip())
        if event.get("event") == LEAVING:
            self.left_at = self.left_at or time.monotonic()
        elif event:
            self.step = int(event["step"]) if event["event"] in ("step", "resume") else self.step
            self._progress.show(event)
        elif not sys.stderr.isatty():
            print(line, file=sys.stderr, flush=True)

    def keep(self) -> None:
        """Write the log, whole."""
        if self.lines:
            storage.write_bytes(self.path, ("\n".join(self.lines) + "\n").encode())

    @property
    def where(self) -> str:
        """Where the failure happened and what to do next, for the end of an error message."""
        resumable = storage.exists(storage.join(self.run.checkpoints, "last.json"))
        hint = "the next attempt goes on from the last checkpoint" if self.role == "train" and resumable else ""
        return f"at step {self.step}; see {self.path}; {hint or 'start it again'}"


def _finished(role: str, run: Run) -> bool:
    answer = (f"{role}-found.json",) * storage.exists(run.path(f"{role}-asked.json"))
    return all(storage.exists(run.path(name)) for name in (*RESULTS[role], *answer))


def _follow(jobs: Jobs, job: Job, cluster: ClusterConfig, job_log: _JobLog) -> State:
    """The job's last state; worker 0's log is shown meanwhile.

    Raises:
        WorkerError: it waited or ran for too long, and was deleted.
    """
    ended = threading.Event()

    def listen() -> None:
        for line in jobs.logs(job, ended):
            job_log.add_line(line)

    thread = threading.Thread(target=listen, daemon=True, name="worker-0")
    thread.start()
    try:
        return _wait(jobs, job, cluster, job_log)
    finally:
        ended.set()
        thread.join(GRACE_S)


def _wait(jobs: Jobs, job: Job, cluster: ClusterConfig, job_log: _JobLog) -> State:
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
        if job_log.left_at and now - job_log.left_at > LEAVE_S and _finished(job_log.role, job_log.run):
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


def _job_error(job: Job, state: State, cluster: ClusterConfig, job_log: _JobLog) -> DesError:
    """The error of a job without a result: a user's mistake, else the pod's end, else the workers' last message."""
    if state.phase == "succeeded":
        return WorkerError(
            f"job {job.name} succeeded, but left no {RESULTS[job_log.role][-1]} in {job_log.run.folder}; "
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
    return _pod_error(job, state, errors, cluster, job_log.where) or _last_words(
        job, state, errors, output, job_log.where
    )


def _pod_error(job: Job, state: State, errors: list[DesError], cluster: ClusterConfig, where: str) -> DesError | None:
    """The error that Kubernetes reports, if it is the cause."""
    # A pod whose end has a name is the cause; others end because of it.
    pod = next((one for one in state.fallen if one.reason not in ("Error", "Completed")), None)
    if pod and pod.reason == "OOMKilled":
        return OutOfMemoryError(
            f"pod {pod.pod} was killed (OOMKilled) {where}; its {job.memory} of memory "
            f"({'set by' if cluster.memory else 'predicted, for want of'} cluster.memory) were not enough: set more, "
            "or use more workers"
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

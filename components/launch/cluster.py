"""Runs N workers as one PyTorchJob on a cluster (cluster.backend = "pytorchjob").

inputs.json of the run -> job of cluster.nodes pods (job.py) -> the role's results in the run's folder
"""

from __future__ import annotations

import os

from components.launch.environment import THREADS, image_of
from components.launch.job import run_job
from components.launch.job_log import Outcome
from components.launch.memory import pod_memory
from components.launch.roles import MODULES, Role
from des_core import storage
from des_core.config import Config
from des_core.errors import ConfigError
from des_core.run import PROFILE, Run
from des_core.secrets import hidden
from k8s.jobs import Job, Jobs, connect, in_pod

RESULTS: dict[str, tuple[str, ...]] = {
    "train": ("training.json",),
    "evaluate": ("predictions/_manifest.json", "report.json"),
    "score": ("score-found.json",),
}
"""What a role has written when it is done, beside its answer where it was asked to compare."""


def launch(role: Role, run: Run, resume: bool = False, module: str = "", jobs: Jobs | None = None) -> None:
    """Run a role as one job of ``cluster.nodes`` pods until its result is in storage.

    Args:
        module: the workers' module, if not the role's own.
        jobs: the cluster; by default the one that this process is in.

    Raises:
        DesError: the job failed, was deleted or took too long; UserError where it is the user's to mend.
    """
    outcome = outcome_of(role, run)
    if outcome.finished():
        return
    check(run.config)
    run_job(jobs or connect(), job_of(role, run, resume, module), run.config.cluster, outcome)


def outcome_of(role: Role, run: Run) -> Outcome:
    """What a role of a run leaves behind."""
    results = [run.path(name) for name in RESULTS[role]]

    def finished() -> bool:
        answer = [run.path(f"{role}-found.json")] * storage.exists(run.path(f"{role}-asked.json"))
        return all(storage.exists(result) for result in (*results, *answer))

    return Outcome(
        finished=finished,
        result=results[-1],
        log=run.path(f"{role}.log"),
        pointer=storage.join(run.checkpoints, "last.json") if role == "train" else "",
        memory_from="set by cluster.memory" if run.config.cluster.memory else "predicted, for want of cluster.memory",
    )


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

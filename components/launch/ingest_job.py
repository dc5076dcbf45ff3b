"""Ingests on a Ray cluster of its own on Kubernetes: a RayJob whose entrypoint is this module.

    config in storage -> RayJob (job.py): python -m components.launch.ingest_job -> the feature store's manifests

The entrypoint reads raw logs as the step itself would with ``ingest.engine = "ray"``, and Ray tells it by RAY_ADDRESS
which cluster is its own. The step then finds the feature store whole, and pins its run.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import traceback

from components import finished
from components.launch import cluster
from components.launch.environment import image_of
from components.launch.job import run_job
from components.launch.job_log import Outcome
from des_core import log, storage
from des_core.config import Config, parse_config
from des_core.errors import DesError, of_system
from des_core.run import features_uri
from des_core.secrets import hidden
from k8s.jobs import Job, Jobs, connect
from k8s.ray import RAY

ALL = "all"


def launch(config: Config, as_of: str, jobs: Jobs | None = None) -> None:
    """Run a RayJob until the feature store is made of the present logs; nothing, if it is.

    Args:
        as_of: a day, or "all" for whole logs.
        jobs: the cluster; by default the one that this process is in.

    Raises:
        DesError: the job failed, was deleted or took too long; UserError where it is the user's to mend.
    """
    if is_done(config, as_of):
        return
    cluster.check(config)
    job = job_of(config, as_of)
    outcome = Outcome(
        finished=lambda: is_done(config, as_of),
        result=features_uri(config),
        log=storage.join(config.storage.root, "ingest", f"{job.name}.log"),
        memory_from="ingest.memory_mb",
    )
    storage.write_json(_config_uri(config), config.recorded.model_dump(mode="json"))
    run_job(jobs or connect(RAY), job, config.cluster, outcome)


def is_done(config: Config, as_of: str) -> bool:
    """Whether the feature store is made of the logs as they are now."""
    return finished.is_ingested(config) if as_of == ALL else finished.day_parts(config, as_of) is not None


def job_of(config: Config, as_of: str) -> Job:
    """What ingestion asks of the cluster."""
    cluster_config, ingest = config.cluster, config.ingest
    # KubeRay refuses names of more than 47 characters.
    digest = hashlib.sha256(f"{config.features_digest} {as_of}".encode()).hexdigest()
    return Job(
        name=f"{config.run.name[:28]}-{digest[:10]}-ingest",
        image=image_of(config),
        command=(*("python", "-m", "components.launch.ingest_job"), "--config", _config_uri(config), "--as-of", as_of),
        env={"PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"},
        nodes=ingest.workers,
        nproc_per_node=1,
        cpu=str(ingest.cpus),
        memory=f"{ingest.memory_mb}Mi",
        gpus=0,
        deadline_s=cluster_config.deadline_s,
        queue=cluster_config.queue,
        labels={"des/run": config.run.name[:63].rstrip("-"), "des/role": "ingest"},
    )


def _config_uri(config: Config) -> str:
    return storage.join(config.storage.root, "ingest", f"{config.run.name}-{config.digest[:12]}.json")


def main() -> None:
    """The entrypoint of the RayJob: ingest, or leave one line that says why not."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True, help="address of the config's JSON")
    parser.add_argument("--as-of", required=True, help='a day, or "all"')
    arguments = parser.parse_args()
    from components import stages

    try:
        config = parse_config(storage.read_bytes(arguments.config).decode(), arguments.config)
        done = stages.ingest_logs(config, arguments.as_of)
        log.emit("ingested", what=done)
    except Exception as error:
        known = of_system(error) if isinstance(error, OSError) else error
        if not isinstance(known, DesError):
            print(hidden(traceback.format_exc()), file=sys.stderr, flush=True)
            known = DesError(f"ingestion crashed ({type(error).__name__}: {str(error)[:200]})")
        log.emit("error", code=known.code, message=" ".join(str(known).split()))
        sys.exit(known.exit_code)


if __name__ == "__main__":
    main()

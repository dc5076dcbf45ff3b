"""A cluster of local processes: each pod of a rendered job is its container's command, with its environment."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from k8s.jobs import Job, State
from k8s.manifest import render
from k8s.pods import Fallen
from k8s.pytorch import PYTORCH
from tests.k8s.test_jobs import TEMPLATE

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent


class LocalPods:
    """The four verbs over processes; what the operator would add to a pod is added here.

    Args:
        folder: takes a log for each pod.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pods: list[subprocess.Popen[bytes]] = []
        self.commands: list[list[str]] = []

    def submit(self, job: Job) -> None:
        manifest = render(PYTORCH, TEMPLATE, dataclasses.replace(job, namespace="des"))
        worker = manifest["spec"]["pytorchReplicaSpecs"]["Worker"]
        container = worker["template"]["spec"]["containers"][0]
        self.commands.append(container["command"])
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        operator = {"PET_NNODES": str(worker["replicas"]), "PET_NPROC_PER_NODE": manifest["spec"]["nprocPerNode"]}
        network = {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port)}
        elastic = manifest["spec"].get("elasticPolicy")
        if elastic:
            operator["PET_NNODES"] = f"{elastic['minReplicas']}:{elastic['maxReplicas']}"
            operator |= {"PET_RDZV_BACKEND": elastic["rdzvBackend"], "PET_RDZV_ID": job.name}
            operator |= {"PET_RDZV_ENDPOINT": f"127.0.0.1:{port}", "PET_MAX_RESTARTS": str(elastic["maxRestarts"])}
        image = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
        self.pods = []
        for index in range(worker["replicas"]):
            if elastic:
                # By their addresses pods know which of them serves the rendezvous; here all have one.
                operator["PET_RDZV_CONF"] = f"is_host={int(index == 0)}"
            fields = {
                "metadata.name": f"{job.name}-worker-{index}",
                "metadata.labels['training.kubeflow.org/replica-index']": str(index),
            }
            given = {one["name"]: _value(one, fields) for one in container["env"]}
            # HOME is a folder of the image that is not here.
            environment = given | image | operator | network | {"HOME": str(self.folder)}
            with open(self._log(index), "wb") as file:
                self.pods.append(
                    subprocess.Popen(
                        container["command"], env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=self.folder
                    )
                )

    def watch(self, job: Job) -> Iterator[State]:
        while True:
            codes = [pod.poll() for pod in self.pods]
            if all(code == 0 for code in codes):
                yield State("succeeded")
                return
            if any(codes):
                self.delete(job)
                fell = [self._fallen(job, index, code) for index, code in enumerate(codes) if code]
                yield State("failed", "JobFailed: a worker failed", fallen=tuple(fell))
                return
            yield State("running")
            time.sleep(0.1)

    def logs(self, job: Job, ended: threading.Event) -> Iterator[str]:
        with open(self._log(0)) as file:
            while True:
                last = ended.is_set()
                yield from (line.rstrip("\n") for line in file.readlines())
                if last:
                    return
                time.sleep(0.05)

    def delete(self, job: Job, patience_s: float = 0.0) -> None:
        for index in range(len(self.pods)):
            self.kill(index)

    def kill(self, index: int) -> None:
        """End a pod as its node's failure would."""
        for pid in [self.pods[index].pid, *_below(self.pods[index].pid)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.pods[index].wait()

    def _log(self, index: int) -> Path:
        return self.folder / f"pod-{index}.log"

    def _fallen(self, job: Job, index: int, code: int) -> Fallen:
        lines = tuple(self._log(index).read_text().splitlines()[-40:])
        return Fallen(f"{job.name}-worker-{index}", "Error", "", code if code > 0 else 128 - code, "", lines)


def _value(variable: dict[str, Any], fields: dict[str, str]) -> str:
    if "value" in variable:
        return str(variable["value"])
    return fields[variable["valueFrom"]["fieldRef"]["fieldPath"]]


def _below(pid: int) -> list[int]:
    """Ids of all processes under one."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents.setdefault(int(words[1]), []).append(int(stat.parent.name))
    found, left = [], [pid]
    while left:
        below = parents.get(left.pop(), [])
        found += below
        left += below
    return found

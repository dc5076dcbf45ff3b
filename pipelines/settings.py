"""The pods of a compiled pipeline's steps: their image, volume, secrets, rights and sizes, from the config.

The DAG knows none of this; ``settled`` builds it again with every step settled. What KFP itself has no word for comes
from kfp-kubernetes and becomes the second document of the YAML::

    storage.root a path      -> the claim ``des-storage`` at /data, under which it must lie
    cluster.image            -> the steps' image, and DES_IMAGE in them, for the workers that they start
    cluster.cpu, memory      -> requests and limits of the steps that handle data; the others are small
    secrets                  -> environment by reference; a secret or key that is not there is left out
    POD_NAME, POD_UID, ...   -> the step's own pod, which owns the training job that it starts
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import wraps
from typing import Any

from kfp import dsl, kubernetes
from kfp.dsl.graph_component import GraphComponent
from kfp.dsl.pipeline_context import Pipeline

from components.launch.environment import image_of
from components.step import IMAGE
from des_core.addresses import sqlite_path
from des_core.config import Config
from des_core.errors import ConfigError
from des_core.secrets import without_secrets

VOLUME = "des-storage"
"""Claim of k8s/base."""

MOUNT = "/data"
"""Where steps and workers see it."""

USER = 10001
"""User and group of the image."""

SECRETS = {
    "des-s3": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION"),
    "des-mlflow": ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
    "des-webhook": ("DES_WEBHOOK",),
}
"""Secret: its keys, which are the variables' names as well."""

OWN_POD = {"POD_NAME": "metadata.name", "POD_NAMESPACE": "metadata.namespace", "POD_UID": "metadata.uid"}

SMALL = ("250m", "1Gi")
"""CPU and memory of a step that only asks or watches."""

STEP_MEMORY = "4Gi"
"""Of a step that handles data, where cluster.memory is not set."""

ON_GPU = ("train", "evaluate", "score")
"""Steps that run the model, where they do so in their own pod."""

SPARE_S = 1800
"""Seconds of a step beside what it waits for: its image is pulled, its packages are imported."""


def settled(pipeline: GraphComponent, config: Config) -> GraphComponent:
    """The same pipeline with the pod settings of this config on every step."""

    @wraps(pipeline.pipeline_func)
    def whole(*inputs: Any) -> None:
        pipeline.pipeline_func(*inputs)
        for task in Pipeline.get_default_pipeline().tasks.values():
            apply_pod_settings(task, config)

    about = pipeline.component_spec
    return dsl.pipeline(name=about.name, description=about.description)(whole)


def apply_pod_settings(task: dsl.PipelineTask, config: Config) -> None:
    """Give a step all that its pod needs."""
    image = image_of(config, IMAGE)
    task.set_caching_options(False)
    task.set_container_image(image)
    task.set_env_variable("DES_IMAGE", image)
    _size(task, config)
    for name, field in OWN_POD.items():
        kubernetes.use_field_path_as_env(task, name, field)
    for secret, keys in SECRETS.items():
        kubernetes.use_secret_as_env(task, secret, {key: key for key in keys}, optional=True)
    if any(_on_volume(path) for _, path in _paths(config)):
        kubernetes.mount_pvc(task, VOLUME, MOUNT)
    kubernetes.set_security_context(task, run_as_user=USER, run_as_group=USER, run_as_non_root=True)
    kubernetes.set_image_pull_policy(task, "IfNotPresent")
    kubernetes.add_pod_label(task, "app.kubernetes.io/part-of", "des")
    kubernetes.add_pod_label(task, "app.kubernetes.io/component", "step")
    # A node that is emptied for thrift would take a day's training with it.
    kubernetes.add_pod_annotation(task, "cluster-autoscaler.kubernetes.io/safe-to-evict", "false")


def as_seen(config: Config) -> Config:
    """The config as pods see it: their own files go to the one folder that each can write to.

    Raises:
        ConfigError: a path outside the volume, which no pod could reach or which would go with it.
    """
    for key, path in _paths(config):
        if "://" in path or _on_volume(path):
            continue
        if key == "registry.tracking_uri":
            raise ConfigError(
                f"registry.tracking_uri = sqlite:///{path} is a file that goes with a step's pod; "
                f"set it to an MLflow server, like http://mlflow:5000, or to sqlite:///{MOUNT}/mlflow.db"
            )
        raise ConfigError(
            f"{key} = {path} is not on the cluster's volume; "
            f"put it under {MOUNT}, where the claim {VOLUME} is mounted, or use an s3:// or gs:// address"
        )
    run = config.run.model_copy(update={"dir": f"/tmp/runs/{config.run.name}"})
    return config.model_copy(update={"run": run})


def check_secrets(config: Config) -> None:
    """Refuse a secret in the config: it is a parameter that everyone who sees the pipeline can read.

    Raises:
        ConfigError: the key, without the secret.
    """
    if config.notify.webhook:
        raise ConfigError(
            "notify.webhook is as good as a password, and a pipeline's config can be read by everyone; leave it out, "
            "and put it into the secret des-webhook, key DES_WEBHOOK"
        )
    for key, text in _texts("", config.model_dump(mode="json")):
        if without_secrets(text) != text:
            raise ConfigError(
                f"{key} has a password in it, and a pipeline's config can be read by everyone; leave it out of the "
                f"address and put it into a secret that steps get as environment: {', '.join(SECRETS)}"
            )


def _size(task: dsl.PipelineTask, config: Config) -> None:
    cluster, name = config.cluster, task.name
    away = cluster.backend == "pytorchjob"
    small = name in ("resolve", "notify") or (name == "train" and away)
    cpu, memory = SMALL if small else (cluster.cpu, cluster.memory or STEP_MEMORY)
    task.set_cpu_request(cpu).set_cpu_limit(cpu)
    try:
        task.set_memory_request(memory).set_memory_limit(memory)
    except ValueError:
        raise ConfigError(f"cluster.memory = {memory!r} must be whole for Kubeflow, like 1536Mi or 4Gi") from None
    if cluster.gpus and not away and name in ON_GPU:
        task.set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(cluster.gpus)
    wait_s = cluster.deadline_s
    if name == "train":
        # It goes on from its last checkpoint.
        task.set_retry(2, backoff_duration="60s", backoff_factor=2.0, backoff_max_duration="600s")
    if name in ON_GPU:
        wait_s += cluster.queue_timeout_s if away else 0
    if name == "resolve":
        wait_s = 3600 * config.recurring.wait_hours
    kubernetes.set_timeout(task, math.ceil(wait_s) + SPARE_S)


def _paths(config: Config) -> Iterator[tuple[str, str]]:
    """Every place that a run reads or writes, with its key."""
    yield "storage.root", config.storage.root
    yield "registry.tracking_uri", sqlite_path(config.registry.tracking_uri)
    for key in ("path", "train", "valid", "test", "ready"):
        value = getattr(config.source, key)
        for path in (value,) if isinstance(value, str) else value:
            if path:
                yield f"source.{key}", path
    for join in config.source.join:
        yield "source.join.path", join.path


def _on_volume(path: str) -> bool:
    return path == MOUNT or path.startswith(f"{MOUNT}/")


def _texts(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every text of a config with its key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for word, item in value.items():
            yield from _texts(f"{key}.{word}".lstrip("."), item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(key, item)

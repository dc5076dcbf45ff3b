"""A TOML file or the JSON of a resolved config -> a checked ``Config``."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from des_core.addresses import sqlite_address
from des_core.config.place import StorageConfig
from des_core.config.toml_file import apply_override, read_document, validation_message
from des_core.config.whole import Config
from des_core.errors import ConfigError


def load_config(path: str | Path, overrides: tuple[str, ...] = (), in_pods: bool = False) -> Config:
    """The checked run of a TOML file, after ``section.key=value`` overrides.

    Args:
        in_pods: the run's steps are pods, and its paths theirs.

    Raises:
        ConfigError: the file, a key, a value or an environment variable is not right.
    """
    relative: dict[str, str] = {}
    document = read_document(path, relative)
    for override in overrides:
        apply_override(document, override, relative)
    origin = " ".join([str(path), *(f"--set {override}" for override in overrides)])
    config = parse_config(document, origin)
    if in_pods or config.cluster.backend == "pytorchjob":
        config = _for_cluster(config, relative, origin)
    run_dir = os.path.abspath(config.run.dir or os.path.join("runs", config.run.name))
    for key, path in (("run.dir", run_dir), ("storage.root", config.storage.root)):
        if "://" not in path and re.search("%[0-9A-Fa-f]{2}", path):
            raise ConfigError(f"{origin}: {key} = {path!r}: MLflow reads such a % as an escape; choose another folder")
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": run_dir}),
            "storage": StorageConfig(root=config.storage.root or run_dir),
            "registry": config.registry.model_copy(
                update={"tracking_uri": config.registry.tracking_uri or sqlite_address(f"{run_dir}/mlflow.db")}
            ),
        }
    )


def _for_cluster(config: Config, relative: dict[str, str], origin: str) -> Config:
    """The config, none of whose paths counts from a folder of this machine.

    Raises:
        ConfigError: one does, or no place is named where steps and workers both see the results.
    """
    for key, text in relative.items():
        raise ConfigError(
            f"{origin}: {key} = {text!r} is a relative path, and a pod has no such folder; "
            "give a path from / on its volume, or an address like s3://bucket/folder"
        )
    root = config.storage.root or config.run.dir
    if not root:
        raise ConfigError(
            f"{origin}: storage.root is not set, and the pods of steps and workers must share it; "
            "give a path from / on their volume, or an address like s3://bucket/folder"
        )
    if "://" in root and not config.registry.tracking_uri:
        raise ConfigError(
            f"{origin}: registry.tracking_uri is not set, and an SQLite file would go with its pod; "
            "name an MLflow server, like http://mlflow:5000"
        )
    if config.run.dir or "://" in root:
        return config
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": root})})


def parse_config(document: dict[str, Any] | str, origin: str = "config") -> Config:
    """A checked run from a TOML document or from the JSON that ``model_dump_json`` wrote."""
    try:
        document = json.loads(document) if isinstance(document, str) else document
        return Config.model_validate(document)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{origin}: not valid JSON: {error}") from None
    except ValidationError as error:
        raise ConfigError(f"{origin}: {validation_message(error, Config, document)}") from None

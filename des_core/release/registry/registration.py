"""Registering a judged model: its files, numbers and pages in MLflow, a version with tags, and the aliases.

Every judged model becomes a version: ``candidate`` always points at the latest, ``champion`` at the last one that the
gate accepted. A version carries its run's key, so a run that is registered again finds its version and makes no other.
Aliases may be moved by hand at any time: a run that was judged against another champion is refused.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from des_core import remote, scratch, storage
from des_core.config import Config
from des_core.contracts import Record, Reference
from des_core.errors import RegistryError
from des_core.release.registry import lineage
from des_core.release.registry.mlflow_client import (
    aliases_of,
    by_alias,
    connect,
    of_run,
    wait_s,
)
from des_core.run import Run
from des_core.secrets import hidden
from des_core.verdict import Verdict

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


HISTORY_POINTS = 500
"""Loss points logged to MLflow: enough for a curve, however long the run."""

PACKAGES = ("mlflow", "numba", "numpy", "pandas", "pyarrow", "pydantic", "safetensors", "torch")
"""What a process that serves the model needs beside our code. That is named by version and digest (lineage.py): a copy
of it in every version would be most of the registry's files."""

LOADER = "des_core.release.serve.pyfunc"

DESCRIPTION = "des.json"

PAGES = (
    *("report.html", "report.json", "gate.json", "training.json"),
    *("inputs.json", "new_rows.json", "champion.json"),
)


class Registered(Record):
    """``version.json``: where the registry keeps a run's model."""

    name: str
    version: str
    aliases: tuple[str, ...]
    """Those that pointed at it when this was written."""
    accepted: bool
    run_key: str
    gate: str
    """sha256 of the gate.json that it was registered with, as its version's tag has it."""
    tracking_uri: str


Describe = Callable[[Run, str], pa.Table]
"""Writes the files of a run's model, ``des.json`` and what lies beside it, into a local folder; a few raw records."""


def register(run: Run, verdict: Verdict, describe: Describe) -> tuple[Reference, bool]:
    """``version.json`` of the run's model, and whether a version of this run was there already.

    ``describe`` is called for a new version only.

    A registry that stops answering half-way is waited for (``registry.wait_s``), and what was begun there is begun
    again: a run has one version, however often it is tried.

    Raises:
        RegistryError: another version became champion since the gate compared.
        UnavailableError: the registry did not answer in that time.
    """
    uri = run.config.registry.tracking_uri
    ask = partial(_register, run, verdict, describe)
    return remote.wait_for(f"MLflow at {hidden(uri)}", ask, wait_s(run.config))


def _register(run: Run, verdict: Verdict, describe: Describe) -> tuple[Reference, bool]:
    """One attempt of ``register``."""
    config = run.config
    with connect(config.registry.tracking_uri) as client:
        version = of_run(client, run)
        adopted = version is not None
        if version is None:
            _refuse_moved_champion(client, run, verdict)
            with scratch.folder("model") as place:
                folder = str(Path(place) / "model")
                example = describe(run, folder)
                model_uri, mlflow_run = _log(client, run, verdict, folder, example)
                digest = storage.digest_file(storage.join(folder, DESCRIPTION))
            made = _create_version(client, run, verdict, model_uri, mlflow_run, digest)
            # Another process may have registered this very run meanwhile: the first version is the run's.
            version = of_run(client, run) or made
            if str(version.version) != str(made.version):
                client.delete_model_version(made.name, made.version)
                adopted = True
            _drop_leftovers(client, run, version)
        elif version.tags.get("des.gate_digest") != verdict.written_sha256:
            version = _judge_again(client, run, verdict, version)
            adopted = False
        if version.tags.get("des.complete") != "true":
            version = _set_aliases(client, version)
        record = record_of(client, run, version)
    return record.write(run.path("version.json")), adopted


def _judge_again(client: MlflowClient, run: Run, verdict: Verdict, version: ModelVersion) -> ModelVersion:
    """Update the tags of a version whose run was judged again by other bounds.

    A champion that would no longer be accepted stays until somebody moves the alias.
    """
    name, number = version.name, version.version
    client.set_model_version_tag(name, number, "des.complete", "false")
    tags = lineage.tags(run, verdict, storage.read_json(run.path("report.json")))
    tags |= {"des.previous_champion": verdict.champion, "des.gate_digest": verdict.written_sha256}
    for key, value in tags.items():
        if value != version.tags.get(key, ""):
            client.set_model_version_tag(name, number, key, value)
    if version.run_id:
        _log_pages(client, version.run_id, run)
    return client.get_model_version(name, number)


def record_of(client: MlflowClient, run: Run, version: ModelVersion) -> Registered:
    return Registered(
        name=run.config.run.name,
        version=str(version.version),
        aliases=aliases_of(client, version),
        accepted=version.tags["des.verdict"] == "accept",
        run_key=run.key,
        gate=version.tags.get("des.gate_digest", ""),
        tracking_uri=hidden(run.config.registry.tracking_uri),
    )


def _refuse_moved_champion(client: MlflowClient, run: Run, verdict: Verdict) -> None:
    """A verdict holds against the champion it compared, and against no other."""
    name = run.config.run.name
    present = by_alias(client, name, "champion")
    version = "" if present is None else str(present.version)
    if version == verdict.champion:
        return
    moved = f"champion of {name} is now version {version or 'none'}"
    if run.day is not None:
        raise RegistryError(
            f"{moved}, the run of {run.day.as_of} was pinned to {run.day.champion or 'none'}; "
            f"run the day again, to go on from the present one: des run --as-of {run.day.as_of}"
        )
    raise RegistryError(
        f"{moved}, the gate compared {verdict.champion or 'none'}; run des evaluate and des register again"
    )


def _log(client: MlflowClient, run: Run, verdict: Verdict, folder: str, example: pa.Table) -> tuple[str, str]:
    """The logged model's address and the id of its MLflow run."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Schema, TensorSpec

    report = storage.read_json(run.path("report.json"))
    tags = lineage.tags(run, verdict, report)
    experiment = _experiment(client, run.config)
    with mlflow.start_run(experiment_id=experiment, run_name=run.key[:12], tags=tags) as active:
        info = mlflow.pyfunc.log_model(
            name="model",
            loader_module=LOADER,
            data_path=folder,
            # No input schema: pyfunc.py says why.
            signature=ModelSignature(outputs=Schema([TensorSpec(np.dtype(np.float64), (-1,))])),
            input_example=example.to_pandas(),
            pip_requirements=[f"{name}=={metadata.version(name).partition('+')[0]}" for name in PACKAGES],
        )
        _log_numbers(client, active.info.run_id, run.config, report, verdict)
        _log_pages(client, active.info.run_id, run)
    return info.model_uri, active.info.run_id


def _drop_leftovers(client: MlflowClient, run: Run, version: ModelVersion) -> None:
    """Delete the MLflow runs that attempts to register this run have left without a version."""
    for left in client.search_runs([_experiment(client, run.config)], f"tags.`des.run_key` = '{run.key}'"):
        if left.info.run_id != version.run_id:
            client.delete_run(left.info.run_id)


def _experiment(client: MlflowClient, config: Config) -> str:
    """Id of the run's experiment; without a server its artifacts are ours to place."""
    from mlflow.exceptions import MlflowException

    name = config.run.name
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    served = config.registry.tracking_uri.startswith("http")
    root = config.run.dir if "://" in config.storage.root else config.storage.root
    try:
        place = None if served else Path(root, "artifacts").absolute().as_uri()
        return client.create_experiment(name, place)
    except MlflowException:
        # Another run of the same name may have made it in the meantime.
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)


def _ledger_numbers(name: str, line: dict[str, Any]) -> dict[str, float]:
    """A line of the ledger, its bytes and milliseconds per step, in all and by direction."""
    numbers: dict[str, float] = {}
    for way in ("", "forward", "backward"):
        part = line.get(way) if way else line
        if part is not None:
            place = f"{name}/{way}" if way else name
            numbers |= {
                f"bytes/{place}/{kind}": float(part[f"{kind}_bytes_per_step"]) for kind in ("predicted", "counted")
            }
            numbers[f"ms/{place}"] = float(part["ms_per_step"])
    return numbers


def _log_numbers(client: MlflowClient, run_id: str, config: Config, report: dict[str, Any], verdict: Verdict) -> None:
    """Metrics and the gate's intervals, curves, bytes of each exchange, and the config as parameters to compare."""
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    single = lineage.numbers(report, "test") | lineage.numbers(report.get("valid") or {}, "valid")
    for name, value in verdict.metrics.items():
        single[f"gate/{name}"] = value
    for name, (low, high) in verdict.intervals.items():
        single |= {f"gate/{name}_low": low, f"gate/{name}_high": high}
    for name in ("steps", "workers", "samples_per_s", "peak_rss_mb"):
        if report.get(name) is not None:
            single[name] = float(report[name])
    for name, line in (report.get("exchange") or {}).items():
        single |= _ledger_numbers(re.sub(r"[^A-Za-z0-9_. -]", "_", name), line)
    for size in (report.get("table") or [])[-1:]:
        single |= {f"table/{key}": float(value) for key, value in size.items() if key != "step"}
    metrics = [Metric(name, value, now, 0) for name, value in single.items()]
    history = report.get("history") or []
    stride = max(1, -(-len(history) // HISTORY_POINTS))
    metrics += [Metric("loss", float(point["loss"]), now, int(point["step"])) for point in history[::stride]]
    for point in report.get("epochs") or []:
        if point.get("auc") is not None:
            metrics.append(Metric("epoch_valid_auc", float(point["auc"]), now, int(point["step"])))
    params = [
        Param(f"{section}.{key}", str(value)[:500])
        for section in ("model", "train", "source", "split")
        for key, value in config.recorded.model_dump(mode="json")[section].items()
    ]
    client.log_batch(run_id, metrics=metrics[:1000], params=params[:100])


def _log_pages(client: MlflowClient, run_id: str, run: Run) -> None:
    with scratch.folder("pages") as folder:
        (Path(folder) / "config.json").write_text(
            json.dumps(run.config.recorded.model_dump(mode="json"), indent=1), "utf-8"
        )
        (Path(folder) / "environment.txt").write_text(lineage.environment(), "utf-8")
        for page in PAGES:
            if storage.exists(run.path(page)):
                (Path(folder) / page).write_bytes(storage.read_bytes(run.path(page)))
        client.log_artifacts(run_id, folder)


def _create_version(
    client: MlflowClient, run: Run, verdict: Verdict, model_uri: str, mlflow_run: str, digest: str
) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    name = run.config.run.name
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    report = storage.read_json(run.path("report.json"))
    tags = lineage.tags(run, verdict, report) | {"des.previous_champion": verdict.champion}
    # The model's id as a tag: a version found by its alias does not name it.
    tags["des.model_id"] = model_uri.removeprefix("models:/")
    # Des.json names the checkpoint's manifest by its digest, and that names the weights by theirs: with its own here
    # all of a model is certified by the registry.
    tags["des.model_digest"] = digest
    tags["des.gate_digest"] = verdict.written_sha256
    return client.create_model_version(
        name, model_uri, run_id=mlflow_run, tags=tags, model_id=model_uri.removeprefix("models:/")
    )


def _set_aliases(client: MlflowClient, version: ModelVersion) -> ModelVersion:
    """The version with its aliases set, then marked so: a crash in between is mended by the next run.

    MLflow cannot move an alias only if it has not moved: the champion is looked at once more, last of all.
    """
    name, number = version.name, version.version
    latest = by_alias(client, name, "candidate")
    if latest is None or int(latest.version) < int(number):
        client.set_registered_model_alias(name, "candidate", number)
    if version.tags["des.verdict"] == "accept":
        present = by_alias(client, name, "champion")
        champion = "" if present is None else str(present.version)
        if champion in (version.tags["des.previous_champion"], str(number)):
            client.set_registered_model_alias(name, "champion", number)
        else:
            client.set_model_version_tag(name, number, "des.verdict", "superseded")
    client.set_model_version_tag(name, number, "des.complete", "true")
    return client.get_model_version(name, number)

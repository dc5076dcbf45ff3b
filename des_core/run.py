"""One run: its pinned inputs, and the addresses of its results.

``run_key`` = sha256 of the run's name, its config's digest, its data manifest's digest and, for a day of a recurring
run, the champion that it goes on from: the same inputs are the same run, and every step of it may be repeated after
any crash. Bounds of the gate are not among them: with others the same model is judged again::

    ROOT/features/SPEC/manifest.json         the data (of a day's run: window-DIGEST.json); SPEC: Config.features_digest
    ROOT/checkpoints/KEY/                    the weights while they train
    ROOT/runs/KEY/inputs.json                what was pinned
    ROOT/runs/KEY/new_rows.json              a day's new rows, scored by the champion before training
    ROOT/runs/KEY/training.json              what training measured
    ROOT/runs/KEY/{report.json,report.html,predictions/}   measured.json: what the machine decided, not digested
    ROOT/runs/KEY/champion.json              the champion on the same rows
    ROOT/runs/KEY/gate.json                  the verdict
    ROOT/runs/KEY/version.json               the registered version
    ROOT/latest                              KEY of the latest run
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from des_core import storage
from des_core.config import Config, parse_config
from des_core.contracts import Dataset, Record, Reference
from des_core.errors import ConfigError, StorageError, UserError

PAGES = ("report.json", "report.html")
"""Files of the latest run that are copied to the root, where people look."""


PROFILE = "DES_PROFILE"
"""Variable that asks training workers to measure each phase of a step to its end on the device."""


class Day(Record):
    """What a day of a recurring run was pinned to, beside its config and data."""

    as_of: str
    """The day, like 2026-01-31."""
    days: dict[str, str]
    """Days of the window, each with the sha256 of its part's manifest."""
    left_out: tuple[str, ...] = ()
    """Earlier days that no model of this line has trained on: absent or in quarantine."""
    cut: int
    """Event time in microseconds since 1970 UTC: the day's rows from it on are the tail, which only judges."""
    champion: str = ""
    """Version of the champion that the candidate is compared with, or empty."""
    checkpoint: str = ""
    """Reference of the weights that training goes on from, its path relative to storage.root; empty: from none."""
    kept: tuple[str, ...] = ()
    """Fields that mean the same to those weights."""
    trained_through: int = 0
    """The champion's cut; 0 without one."""
    accepted: tuple[str, ...] = ()
    """Days of the window that a person took out of quarantine: with them the same data are another run."""


@dataclass(frozen=True)
class Run:
    """A config and its pinned data."""

    config: Config
    dataset: Reference
    key: str
    day: Day | None = None
    """None: a run over whole logs."""

    @property
    def trajectory(self) -> str:
        """sha256 of what decides the weights at each step; runs that share it may continue each other."""
        text = f"{self.config.run.name}\n{self.config.trajectory_digest}\n{self.dataset.sha256}"
        if self.day is not None:
            text += f"\n{self.day.checkpoint.rpartition('#')[2]}\n{self.config.recurring.epochs}"
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def folder(self) -> str:
        """Address of this run's results."""
        return storage.join(self.config.storage.root, "runs", self.key[:12])

    @property
    def checkpoints(self) -> str:
        """Address of this run's checkpoints."""
        return storage.join(self.config.storage.root, "checkpoints", self.key[:12])

    @property
    def champion_checkpoint(self) -> Reference | None:
        """The checkpoint that training continues from, if any."""
        if self.day is None or not self.day.checkpoint:
            return None
        return under_root(self.config, self.day.checkpoint)

    def path(self, name: str) -> str:
        """Address of one result."""
        return storage.join(self.folder, name)

    def reference(self, name: str) -> Reference:
        """One result with its present digest.

        Raises:
            StorageError: it is not there.
        """
        return Reference(self.path(name), hashlib.sha256(storage.read_bytes(self.path(name))).hexdigest())

    def publish(self) -> None:
        """Copy the files that people open to the root and mark this run as the latest."""
        root = self.config.storage.root
        for page in PAGES:
            if storage.exists(self.path(page)):
                storage.write_bytes(storage.join(root, page), storage.read_bytes(self.path(page)))
        storage.write_bytes(storage.join(root, "latest"), f"{self.key[:12]}\n".encode())


def under_root(config: Config, relative: str) -> Reference:
    """A reference whose path is relative to storage.root, which may have moved."""
    reference = Reference.parse(relative)
    elsewhere = reference.uri.startswith("/") or "://" in reference.uri
    return reference if elsewhere else Reference(storage.join(config.storage.root, reference.uri), reference.sha256)


def relative_to_root(config: Config, reference: Reference) -> str:
    """The other way round."""
    return str(Reference(reference.uri.removeprefix(config.storage.root.rstrip("/") + "/"), reference.sha256))


def features_uri(config: Config) -> str:
    """Address of the data manifest."""
    return storage.join(config.features_root, "manifest.json")


def pin(config: Config, dataset: Reference | None = None, day: Day | None = None) -> Run:
    """The run of a config and a data manifest (the one in its feature store by default).

    Raises:
        StorageError: inputs.json is there and says something else.
        UserError: nothing was ingested yet.
    """
    if dataset is None:
        uri = features_uri(config)
        if not storage.exists(uri):
            raise UserError(f"{uri}: no features yet; run des ingest with the same config first")
        dataset = Reference(uri, hashlib.sha256(storage.read_bytes(uri)).hexdigest())
    if Dataset.load(dataset).spec != config.features_digest:
        raise UserError(f"{dataset.uri} was made with other source, split or fields; run des ingest again")
    text = f"{config.run.name}\n{config.digest}\n{dataset.sha256}"
    if day is not None:
        text += f"\n{day.as_of}\n{day.champion}\n{day.checkpoint.rpartition('#')[2]}"
        text += "".join(f"\n{accepted}" for accepted in day.accepted)
    run = Run(config, dataset, hashlib.sha256(text.encode()).hexdigest(), day)
    pinned = {
        "name": config.run.name,
        "run_key": run.key,
        "config_digest": config.digest,
        "dataset": relative_to_root(config, dataset),
        "day": None if day is None else day.model_dump(mode="json"),
    }
    inputs = run.path("inputs.json")
    if not storage.exists(inputs):
        storage.write_json(inputs, pinned | {"config": config.recorded.model_dump(mode="json")})
    elif not _says(storage.read_json(inputs), pinned, config.recorded.digest):
        raise StorageError(f"{inputs} says something else than this run (damaged?); delete it and run the same again")
    return run


def _says(found: Any, pinned: dict[str, Any], recorded: str) -> bool:
    """Whether inputs.json has the pinned inputs; its config may differ in places and in the gate's bounds."""
    try:
        config = parse_config(found["config"], "the config")
        return config.digest == recorded and {key: found[key] for key in pinned} == pinned
    except (KeyError, TypeError, ConfigError):
        return False


def dataset_of(config: Config, key: str) -> Reference:
    """The data that a run was pinned to, by the first digits of its key.

    Raises:
        StorageError: its inputs.json is missing or damaged.
    """
    uri = storage.join(config.storage.root, "runs", key, "inputs.json")
    pinned = storage.read_json(uri)
    if not isinstance(pinned, dict) or not isinstance(pinned.get("dataset"), str):
        raise StorageError(f"{uri} names no data (damaged?); run the same again")
    return under_root(config, pinned["dataset"])


def reopen(config: Config, inputs: Reference) -> Run:
    """The run that was pinned as ``inputs`` (runs/KEY/inputs.json).

    Raises:
        UserError: it was pinned with another config.
    """
    pinned = inputs.read()
    if pinned["config_digest"] != config.digest:
        raise UserError(f"{inputs.uri} was pinned with another config; run the steps before this one again")
    day = None if pinned["day"] is None else Day.model_validate(pinned["day"])
    return pin(config, under_root(config, pinned["dataset"]), day)

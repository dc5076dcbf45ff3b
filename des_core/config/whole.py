"""All tables of a run together: what must agree between them, and the digests of what decides what.

The resolved config is one JSON text: the only parameter that the compiled pipeline carries.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import model_validator

from des_core.config.cluster import ClusterConfig
from des_core.config.fields import FieldConfig
from des_core.config.gate import GateConfig
from des_core.config.ingest import IngestConfig
from des_core.config.model import ModelConfig
from des_core.config.optimizer import OptimizersConfig
from des_core.config.place import NotifyConfig, RegistryConfig, RunConfig, StorageConfig
from des_core.config.recurring import EvalConfig, RecurringConfig
from des_core.config.retention import RetentionConfig
from des_core.config.section import Section
from des_core.config.source import SourceConfig, SplitConfig
from des_core.config.table import TableConfig
from des_core.config.train import STEERING, TrainConfig
from des_core.secrets import host_only, without_secrets

NEWER_SOURCE_KEYS = {"time_format": "", "encoding": "utf-8"}
"""Keys of [source] that came after feature stores had been made, and their defaults."""


class Config(Section):
    """A run, whole and checked."""

    run: RunConfig
    source: SourceConfig
    split: SplitConfig = SplitConfig()
    fields: tuple[FieldConfig, ...] = ()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    table: TableConfig = TableConfig()
    optimizer: OptimizersConfig = OptimizersConfig()
    storage: StorageConfig = StorageConfig()
    registry: RegistryConfig = RegistryConfig()
    gate: GateConfig = GateConfig()
    eval: EvalConfig = EvalConfig()
    recurring: RecurringConfig = RecurringConfig()
    retention: RetentionConfig = RetentionConfig()
    ingest: IngestConfig = IngestConfig()
    cluster: ClusterConfig = ClusterConfig()
    notify: NotifyConfig = NotifyConfig()

    @model_validator(mode="after")
    def _parts_agree(self) -> Config:
        names = [field.name for field in self.fields]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"fields: {twice[0]} is declared twice; give each field its own name")
        if self.fields and all(field.input == "dense" for field in self.fields):
            raise ValueError("fields: all are dense inputs; at least one must own rows (input = 'rows')")
        self._check_crosses()
        self._check_wide()
        if not self.fields and self.source.format in ("csv", "parquet"):
            raise ValueError(f"fields: none declared; add [[fields]] tables (format {self.source.format} has no own)")
        if self.split.by == "time" and not self.source.time and self.source.format != "synthetic":
            raise ValueError("split.by = 'time' needs source.time, the column with the event's time")
        paths = (self.source.path,) if isinstance(self.source.path, str) else self.source.path
        if self.split.by == "day" and paths and not self.source.time and not any("{day}" in path for path in paths):
            raise ValueError("split.by = 'day' needs source.time, or {day} in source.path")
        if self.table.idle_days and not self.source.time and self.source.format != "synthetic":
            raise ValueError("table.idle_days needs source.time, the column with the event's time")
        if self.train.lanes < self.train.workers:
            raise ValueError(
                f"train.lanes = {self.train.lanes} must be at least train.workers = {self.train.workers}; raise it"
            )
        if self.table.rows == "bf16" and (self.train.kernels != "triton" or self.train.precision == "fp64"):
            raise ValueError("table.rows = 'bf16' needs train.kernels = 'triton', and a precision other than fp64")
        if self.gate.slices and self.source.task != "click":
            raise ValueError("gate.slices compares AUCs, which ratings have none of; remove it, or set task = 'click'")
        if self.gate.slices and self.fields:
            self.check_slices({field.name: field.kind for field in self.fields})
        places = self.cluster.nodes * self.cluster.nproc_per_node
        if self.cluster.backend == "pytorchjob" and places != self.train.workers:
            raise ValueError(
                f"cluster.nodes * cluster.nproc_per_node = {places} must be train.workers = {self.train.workers}"
            )
        return self

    def _check_wide(self) -> None:
        """Raise ``ValueError`` where wide fields share what others read, or nothing is left for the rest."""
        wide = {field.table or field.name for field in self.fields if field.wide}
        for field in self.fields:
            if (field.table or field.name) in wide and not field.wide and field.input == "rows":
                fix = "set wide = true for all fields of the table, or for none"
                raise ValueError(f"fields.{field.name}: shares a table with a wide field, read in part only; {fix}")
        if wide and all(field.wide or field.input == "dense" for field in self.fields):
            raise ValueError("fields: all that own rows are wide; leave one at least for the rest of the model")
        if wide and self.train.kernels == "triton":
            raise ValueError("wide = true needs train.kernels = 'torch'")

    def _check_crosses(self) -> None:
        """Raise ``ValueError`` unless the parts of crosses are categorical fields."""
        fields = {field.name: field for field in self.fields}
        for field in self.fields:
            for name in field.cross:
                if name not in fields:
                    close = difflib.get_close_matches(name, fields, n=1)
                    hint = f"did you mean {close[0]}?" if close else f"fields: {', '.join(fields)}"
                    raise ValueError(f"fields.{field.name}.cross: there is no field {name!r}; {hint}")
                part = fields[name]
                if part.cross:
                    parts = ", ".join(repr(inner) for inner in part.cross)
                    raise ValueError(f"fields.{field.name}.cross: {name} is a cross itself; name its parts, {parts}")
                if part.kind != "categorical":
                    what = "a number" if part.kind == "numeric" else "a list"
                    fix = "name fields with one value (kind = 'categorical')"
                    raise ValueError(f"fields.{field.name}.cross: {name} is {what}; {fix}")

    def check_slices(self, kinds: Mapping[str, str]) -> None:
        """Raise ``ValueError`` unless gate.slices are fields with values; ``kinds`` are all fields and their kinds."""
        for name in self.gate.slices:
            if name not in kinds:
                close = difflib.get_close_matches(name, kinds, n=1)
                hint = f"did you mean {close[0]}?" if close else f"fields: {', '.join(kinds)}"
                raise ValueError(f"gate.slices: there is no field {name!r}; {hint}")
            if kinds[name] == "numeric":
                raise ValueError(f"gate.slices: {name} is a number; name categorical or multi fields")

    @property
    def digest(self) -> str:
        """sha256 of what decides the model: not where it is stored, or how long, nor by what bounds it is judged."""
        content = self.model_dump(
            mode="json", exclude={"storage", "registry", "cluster", "notify", "gate", "retention", "ingest"}
        )
        content["run"].pop("dir")
        for key in ("wait_hours", "on_missing"):
            content["recurring"].pop(key)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def verdict_digest(self) -> str:
        """sha256 of what decides the verdict on a model and its scores."""
        return hashlib.sha256(self.gate.model_dump_json().encode()).hexdigest()

    @property
    def features_root(self) -> str:
        """Address of the feature store: each set of definitions has its own."""
        return f"{self.storage.root.rstrip('/')}/features/{self.features_digest[:12]}"

    @property
    def recorded(self) -> Config:
        """This config as it is written into results: no user or password in an address."""

        def blank(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: blank(inner) for key, inner in value.items()}
            if isinstance(value, list):
                return [blank(inner) for inner in value]
            return without_secrets(value) if isinstance(value, str) else value

        content = blank(self.model_dump(mode="json"))
        content["notify"]["webhook"] = host_only(self.notify.webhook)
        return Config.model_validate(content)

    @property
    def secrets(self) -> dict[str, str]:
        """What ``recorded`` leaves out, by ``section.key``."""
        whole, shown = self.model_dump(mode="json"), self.recorded.model_dump(mode="json")
        return {
            f"{section}.{key}": value
            for section in ("registry", "notify")
            for key, value in whole[section].items()
            if value != shown[section][key]
        }

    def with_secrets(self, secrets: Mapping[str, str]) -> Config:
        """This config with what its ``recorded`` form left out."""
        content = self.model_dump(mode="json")
        for key, value in secrets.items():
            section, _, name = key.partition(".")
            content[section][name] = value
        return Config.model_validate(content)

    @property
    def trajectory_digest(self) -> str:
        """sha256 of what decides the weights at each step: not how many workers compute it, nor when it stops."""
        content = self.model_dump(mode="json", include={"model", "optimizer", "table"})
        content["train"] = {key: getattr(self.train, key) for key in STEERING}
        if self.train.lr_schedule == "cosine" and not self.train.lr_decay_steps:
            # It ends with the run: how long that is decides the rate of each step.
            content["train"]["epochs"] = self.train.epochs
        content["seed"] = self.run.seed
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def weights_form(self) -> dict[str, Any]:
        """Settings that weights must have been trained with so that training can continue from them."""
        return {
            "model": self.model.model_dump(mode="json", exclude={"init", "dropout"}),
            "optimizer": {"rows.name": self.optimizer.rows.name, "dense.name": self.optimizer.dense.name},
            "precision": "fp64" if self.train.precision == "fp64" else "fp32",
        }

    @property
    def features_digest(self) -> str:
        """sha256 of what decides the feature store, given the raw logs."""
        content = self.model_dump(mode="json", include={"source", "split", "fields"})
        content["source"].pop("ready")
        for key, default in NEWER_SOURCE_KEYS.items():
            # A key that nobody set does not make a new feature store of an old one.
            if content["source"][key] == default:
                content["source"].pop(key)
        for field in content["fields"]:
            for key in ("cross", "wide"):
                if not field[key]:
                    field.pop(key)
        content["allowed_lateness"] = self.recurring.allowed_lateness
        content["seed"] = self.run.seed
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

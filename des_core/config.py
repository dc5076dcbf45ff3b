"""One TOML describes one run; it is checked whole before anything is read or started.

How the file is read is in ``document``. The resolved config is one JSON text: the only parameter
that the compiled pipeline carries.
"""

from __future__ import annotations

import datetime
import difflib
import hashlib
import json
import os
import pkgutil
import re
import zoneinfo
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from des_core.addresses import sqlite_address
from des_core.contracts import WEIGHT
from des_core.document import apply_override, explain, read_document
from des_core.errors import ConfigError
from des_core.secrets import host_only, without_secrets

MODELS = sorted(file.name for file in pkgutil.iter_modules([str(Path(__file__).parent / "engine" / "models")]))
"""Names of the models: files of their folder, listed without importing one."""

STEERING = ("batch", "shuffle", "early_stop", "lr_drop", "precision", "payload", "lanes")
"""Keys of [train] that decide the weights at each step."""

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A frozen table of the TOML; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RunConfig(Section):
    """Who this run is and where it lives."""

    name: str = Field(
        pattern=r"^[a-z][a-z0-9-]*$", max_length=63, description="Name of the run, its folder and the registered model."
    )
    seed: int = Field(0, ge=0, description="Seed of shuffles, first values, dropout and synthetic logs.")
    dir: str = Field(
        "", description="Folder of the run; empty: runs/NAME in the current directory, on a cluster storage.root."
    )


class JoinConfig(Section):
    """A side table joined to every record of the log (left join; unmatched records get missing values)."""

    path: str = Field(description="CSV with a header, or Parquet; read whole into memory.")
    on: str = Field(description="Column present in both; its values must be unique in the side table.")
    columns: tuple[str, ...] = Field((), description="Columns to take; empty means all.")


class SourceConfig(Section):
    """The raw logs."""

    format: Literal["csv", "criteo", "libsvm", "parquet", "synthetic"] = Field(
        "csv", description="Form of the raw logs; gzip and zstd are recognised by their endings."
    )
    path: str | tuple[str, ...] = Field(
        (), description="A file, glob, folder or list of them; may hold {day}, a date like 2026-01-31."
    )
    train: str | tuple[str, ...] = Field((), description="Instead of path: the logs to train on.")
    valid: str | tuple[str, ...] = Field(
        (), description="With train: the logs to validate on; without it, a seeded share of train."
    )
    test: str | tuple[str, ...] = Field((), description="With train: the logs to test on.")
    delimiter: str = Field(",", min_length=1, max_length=1, description="Between columns (csv).")
    quoting: Literal["minimal", "none"] = Field(
        "minimal",
        description='What a double quote at the beginning of a value means (csv). "minimal": the value goes on to the '
        'closing quote, over delimiters and line ends. "none": it is a letter like any other, as in most tab-separated '
        "logs.",
    )
    header: bool | tuple[str, ...] = Field(
        True, description="Whether the first line names the columns, or a list of names for files without one."
    )
    missing: tuple[str, ...] = Field(("", "NA"), description="Texts that mean: no value.")
    timezone: str = Field("UTC", description="Of days, hours, weekdays and of times that name no zone.")
    label: str = Field("label", description="Column with the label.")
    positive: str = Field("", description='Makes a 0/1 label by comparison, e.g. ">= 4"; empty: it is 0 or 1 already.')
    task: Literal["click", "rating"] = Field("click", description="Click: log loss; rating: squared error.")
    ready: str = Field(
        "", description='Marker of a day whose logs are complete, e.g. "logs/{day}/_SUCCESS"; empty: logs are enough.'
    )
    time: str = Field("", description="Column with the event's time: unix seconds or ISO 8601.")
    group: str = Field("", description="Column of the groups of GAUC, usually the user.")
    join: tuple[JoinConfig, ...] = Field((), description="Side tables joined to the log.")
    days: int = Field(3, ge=1, le=366, description="synthetic: days of logs, from 2026-01-01.")
    rows_per_day: int = Field(20_000, ge=1, description="synthetic: rows of each day.")
    max_bad_share: float = Field(
        0.01, ge=0, le=1, description="Share of bad rows above which ingestion fails; others are quarantined."
    )

    @field_validator("positive")
    @classmethod
    def _positive_compares(cls, text: str) -> str:
        number, value = r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", r"\S.*"
        if text.strip() and not re.fullmatch(rf"\s*((>=|<=|>|<)\s*{number}|(==|!=)\s*{value})\s*", text):
            raise ValueError(f'{text!r} is not a comparison; write it like ">= 4" or "== click"')
        return text

    @field_validator("timezone")
    @classmethod
    def _timezone_is_known(cls, name: str) -> str:
        try:
            # An image may come without time zones; UTC needs none.
            return name if name == "UTC" else zoneinfo.ZoneInfo(name).key
        except (OSError, ValueError, zoneinfo.ZoneInfoNotFoundError):
            raise ValueError(f"{name!r} is not a time zone known here; write it like Europe/Berlin") from None

    @model_validator(mode="after")
    def _paths_agree(self) -> SourceConfig:
        if self.format == "synthetic":
            if self.path or self.train or self.valid or self.test:
                raise ValueError("format synthetic makes its own logs: remove path, train, valid and test")
            return self
        if self.path and (self.train or self.valid or self.test):
            raise ValueError("give either path, or train and test, not both")
        if not self.path and not (self.train and self.test):
            raise ValueError("give path, or train and test")
        return self


class SplitConfig(Section):
    """How rows are divided; ignored for parts that files are given for."""

    by: Literal["", "time", "random", "day"] = Field(
        "", description="Empty: time where source.time is set, else random."
    )
    valid: float | str | tuple[str, ...] = Field(
        0.1, description="A share of the rows; by day: a number of days (default 1) or dates. Before test in time."
    )
    test: float | str | tuple[str, ...] = Field(0.1, description="As valid; the last rows or days in time.")

    @model_validator(mode="before")
    @classmethod
    def _days_count_from_one(cls, table: Any) -> Any:
        return {"valid": 1, "test": 1, **table} if isinstance(table, dict) and table.get("by") == "day" else table

    @model_validator(mode="after")
    def _amounts_fit(self) -> SplitConfig:
        if self.by == "day":
            _check_days("valid", self.valid)
            _check_days("test", self.test)
        elif _share("valid", self.valid) + _share("test", self.test) >= 1:
            raise ValueError(
                f"valid = {self.valid} and test = {self.test} leave no rows to train on; make them smaller"
            )
        return self


def _share(key: str, amount: float | str | tuple[str, ...]) -> float:
    if not isinstance(amount, float) or not 0 < amount < 1:
        raise ValueError(f"{key} = {json.dumps(amount)} must be a share between 0 and 1, or set by = 'day'")
    return amount


def _check_days(key: str, amount: float | str | tuple[str, ...]) -> None:
    if isinstance(amount, float):
        if amount < 1 or amount != int(amount):
            raise ValueError(f"{key} = {amount:g} must be a number of days or a list of dates, or set by = 'random'")
        return
    for day in (amount,) if isinstance(amount, str) else amount:
        try:
            datetime.date.fromisoformat(day)
        except ValueError:
            raise ValueError(f"{key} = {day!r} must be a date like 2026-01-31") from None


class FieldConfig(Section):
    """One input of the model, made from one column of the log."""

    name: str = Field(min_length=1, description="Name of the field.")
    column: str = Field("", description="Column of the log; empty means the field's name.")
    kind: Literal["categorical", "multi", "numeric"] = Field(
        "categorical", description="One value, a list of values, or a number. Never guessed from the values."
    )
    separator: str = Field("|", min_length=1, description="Between the values of a multi field.")
    weight: str = Field("", description="Column with the value's weight (multi: a list, same separator).")
    pooling: Literal["sum", "mean", "sqrtn"] = Field(
        "sum", description="How the values of a multi field add up: sum, or divided by n or sqrt(n)."
    )
    transform: Literal["", "log1p", "standard", "bucket"] = Field(
        "", description="numeric: sign(x) log(1+|x|), zero mean and unit variance, or one of 32 quantile buckets."
    )
    derive: str = Field(
        "", description="hour, weekday or year of a time, or regex:PATTERN (its first group, or all it finds)."
    )
    form: Literal["", "text", "whole", "number", "boolean"] = Field(
        "", description="What the values are; empty: settled by the first values that are ingested."
    )
    table: str = Field("", description="Rows are shared by fields that name the same table; empty: own rows.")
    input: Literal["rows", "dense"] = Field(
        "rows", description="numeric: scales a row of its own, or goes into the dense layers as it is (missing: 0)."
    )

    @model_validator(mode="after")
    def _options_fit(self) -> FieldConfig:
        if self.name.startswith(("_", WEIGHT)):
            raise ValueError(f"a name must not begin with _ or {WEIGHT}; rename it and set column")
        if self.transform and self.kind != "numeric":
            raise ValueError("transform needs kind = 'numeric'")
        if self.input == "dense" and (self.kind != "numeric" or self.transform == "bucket" or self.table):
            raise ValueError("input = 'dense' needs kind = 'numeric', no buckets and no table")
        if self.form and self.kind == "numeric":
            raise ValueError("form is for values that own rows; a numeric field's are numbers already")
        if self.weight and self.kind == "numeric":
            raise ValueError("a numeric field takes no weight")
        if self.derive and self.derive not in ("hour", "weekday", "year"):
            if not self.derive.startswith("regex:"):
                raise ValueError("derive is hour, weekday, year or regex:PATTERN")
            try:
                re.compile(self.derive.removeprefix("regex:"))
            except re.error as error:
                raise ValueError(f"bad pattern in derive: {error}") from None
        return self


class ModelConfig(Section):
    """What is trained."""

    name: str = Field("deepfm", description=f"A file of des_core/engine/models: {', '.join(MODELS)}.")
    factors: int = Field(16, ge=1, le=1024, description="Numbers per embedding, k.")
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (64, 32), min_length=1, description="Widths of the fully connected layers, first to last."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="After each hidden layer's activation.")
    batch_norm: bool = Field(False, description="Batch norm over the global batch in each hidden layer.")
    init: NonNegative = Field(0.01, description="Standard deviation of the factors' first values.")
    structure: Literal["parallel", "stacked"] = Field(
        "parallel", description="dcn, dcn_v2: the deep part beside the cross network, or on top of it."
    )
    cross_layers: int = Field(3, ge=1, le=64, description="dcn, dcn_v2: layers of the cross network.")
    cross_rank: int = Field(16, ge=0, description="dcn_v2: rank of a cross layer's weights; 0: full.")
    bottom: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (64,), description="dlrm: widths of the layers under the dense inputs; one of width factors follows."
    )
    attention_layers: int = Field(2, ge=1, le=16, description="autoint: self-attention layers over the fields.")
    attention_heads: int = Field(2, ge=1, le=64, description="autoint: heads of each layer.")
    attention_width: int = Field(16, ge=1, le=1024, description="autoint: numbers per head and field.")

    @field_validator("name")
    @classmethod
    def _model_is_known(cls, name: str) -> str:
        if name not in MODELS:
            close = difflib.get_close_matches(name, MODELS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it is one of {', '.join(MODELS)}"
            raise ValueError(f"unknown model {name!r}; {hint}")
        return name


class TrainConfig(Section):
    """How it is trained."""

    workers: int = Field(1, ge=1, description="Processes the model is spread over.")
    batch: int = Field(1024, ge=1, description="Samples per step over all workers: the global batch.")
    epochs: int = Field(5, ge=1, description="Passes over the train part, at most: see early_stop.")
    max_steps: int = Field(0, ge=0, description="Stop after this many steps; 0: no limit.")
    shuffle: bool = Field(True, description="A new seeded order each epoch; false: the stored order.")
    early_stop: Literal["auc", "none"] = Field("auc", description="What decides patience, lr_drop and keep = best.")
    patience: int = Field(2, ge=1, description="Stop after this many epochs in a row without a better valid AUC.")
    lr_drop: float = Field(1.0, gt=0, le=1, description="Both learning rates times this after an epoch without one.")
    keep: Literal["best", "last"] = Field("best", description="The epoch whose weights are evaluated.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one.")
    precision: Literal["fp32", "fp64"] = Field("fp32", description="Of rows, activations and payloads.")
    exchange: Literal["auto", "sum", "gather", "rows"] = Field(
        "auto", description="How partial results meet; auto: each operator's, chosen jointly as the cheapest plan."
    )
    upper: Literal["auto", "home", "replicated"] = Field(
        "auto", description="What follows a total runs at each sample's home, or for all samples on every worker."
    )
    payload: Literal["full", "bf16"] = Field(
        "full", description="Numbers of partial results on the wire: as computed, or 16 bits (summed in fp32)."
    )
    bandwidth_mbps: NonNegative = Field(
        0.0, description="Of each worker's link, for the plan; 0: measured when training starts."
    )
    latency_us: NonNegative = Field(0.0, description="Of one collective, for the plan; read if bandwidth_mbps is set.")
    lanes: int = Field(64, ge=1, description="Fixed pieces of the batch that key dropout, whatever the workers.")
    checkpoint_steps: int = Field(0, ge=0, description="A checkpoint every so many steps; 0: each epoch only.")
    worker_memory_mb: int = Field(0, ge=0, description="Most row memory per worker that placement allows; 0: any.")


class TableConfig(Section):
    """Which values own rows, decided on the steps' own clock: the same rows for any number of workers."""

    admit_count: int = Field(1, ge=1, description="A value gets its row at this occurrence in training; before: zero.")
    admit_probability: float = Field(
        1.0, gt=0, le=1, description="Or by one coin per step that meets the value; not with admit_count."
    )
    max_rows: int = Field(0, ge=0, description="Most rows over all workers after an eviction; 0: any number.")
    budget_keeps: Literal["frequent", "recent"] = Field(
        "frequent", description="Which rows max_rows keeps: the most often met, or the latest met."
    )
    idle_steps: int = Field(0, ge=0, description="Evict rows not met for more than this many steps; 0: never.")
    idle_days: int = Field(
        0, ge=0, description="Evict rows not met for more than this many days of source.time; 0: never."
    )
    evict_zero: bool = Field(False, description="Evict rows whose weights are all zero (see group_ftrl).")
    evict_every: int = Field(1000, ge=1, description="Steps between evictions; those by days come at a day's end.")

    @model_validator(mode="after")
    def _one_admission(self) -> TableConfig:
        if self.admit_count > 1 and self.admit_probability < 1:
            raise ValueError("admit_count and admit_probability are two ways to admit; set one of them")
        return self


class OptimizerConfig(Section):
    """An update rule."""

    name: Literal["sgd", "adagrad", "rowwise_adagrad", "adam", "adamw", "ftrl", "group_ftrl"] = Field(
        "adam", description="The rule; rowwise_adagrad and the ftrl rules are for rows."
    )
    learning_rate: Positive = Field(0.001, description="Step size.")
    l2: NonNegative = Field(
        0.0, description="Gradient + l2 w (coupled); for rows on touched rows. ftrl: of its closed form."
    )
    l1: NonNegative = Field(0.0, description="ftrl, group_ftrl: pulls single weights to zero.")
    group_l1: NonNegative = Field(0.0, description="group_ftrl: pulls whole rows to zero.")
    ftrl_beta: NonNegative = Field(
        1.0, description="ftrl, group_ftrl: beta of the learning rate alpha/(beta + sqrt n)."
    )
    weight_decay: NonNegative = Field(0.0, description="adamw: decoupled, w - lr weight_decay w.")
    beta1: float = Field(0.9, ge=0, lt=1, description="adam, adamw.")
    beta2: float = Field(0.999, ge=0, lt=1, description="adam, adamw.")
    eps: Positive = Field(1e-8, description="Under the square root's side.")

    @model_validator(mode="after")
    def _decay_fits(self) -> OptimizerConfig:
        if self.weight_decay and self.name != "adamw":
            raise ValueError(f"weight_decay needs name = 'adamw' (it is {self.name!r}); or use l2")
        if self.weight_decay * self.learning_rate >= 1:
            raise ValueError("learning_rate * weight_decay must be below 1: each step would take more than the weight")
        if self.l1 and self.name not in ("ftrl", "group_ftrl"):
            raise ValueError(f"l1 needs name = 'ftrl' or 'group_ftrl' (it is {self.name!r})")
        if self.group_l1 and self.name != "group_ftrl":
            raise ValueError(f"group_l1 needs name = 'group_ftrl' (it is {self.name!r})")
        return self


class RowOptimizerConfig(OptimizerConfig):
    """Rows are met rarely, each by few samples of a batch: their steps are longer."""

    learning_rate: Positive = Field(0.01, description="Step size.")


class OptimizersConfig(Section):
    """Rows and dense weights are updated by their own rules."""

    rows: RowOptimizerConfig = Field(RowOptimizerConfig(), description="How the tables' rows are updated.")
    dense: OptimizerConfig = Field(OptimizerConfig(), description="How the dense layers are updated.")

    @model_validator(mode="after")
    def _dense_has_no_rows(self) -> OptimizersConfig:
        if self.dense.name in ("rowwise_adagrad", "ftrl", "group_ftrl"):
            raise ValueError(f"dense.name = {self.dense.name!r} is for rows: use adagrad")
        return self


class StorageConfig(Section):
    """Where features, checkpoints and reports live."""

    root: str = Field("", description="A folder or s3://, gs:// address; empty means run.dir.")


class RegistryConfig(Section):
    """Where models are registered."""

    tracking_uri: str = Field("", description="MLflow tracking address; empty: SQLite mlflow.db in run.dir.")
    wait_s: NonNegative = Field(
        0.0, description="Seconds to wait for an MLflow that does not answer yet; 0: 300 in a pod, 10 elsewhere."
    )
    embed_limit: int = Field(
        2 << 30, ge=0, description="Bytes of weights above which the model refers to storage.root instead."
    )


class GateConfig(Section):
    """When a candidate becomes champion. Bounds on the click metrics and on drift judge the day's data as well."""

    min_auc: float = Field(0.5, ge=0, le=1, description="Least test AUC (click).")
    max_auc_drop: float = Field(
        0.015,
        ge=0,
        le=1,
        description="Most AUC below the champion's on the same rows, surely: the 95 % interval of the difference lies "
        "above minus this. 2,000 rows tell two warm-started models apart to about 0.01; set less for larger tails.",
    )
    min_samples: int = Field(100, ge=1, description="Fewer test samples are inconclusive: the champion stays.")
    max_logloss: Positive = Field(1e9, description="Most log loss, in nats (click).")
    max_ne: Positive = Field(
        1.0, description="Most normalised entropy (click): above 1 always predicting the mean label were better."
    )
    min_calibration: NonNegative = Field(0.0, description="Least predicted clicks / observed clicks (click).")
    max_calibration: Positive = Field(1e9, description="Most predicted clicks / observed clicks (click).")
    max_rmse: float = Field(1e9, gt=0, description="Most test RMSE (rating).")
    max_rmse_rise: float = Field(
        0.01, ge=0, description="Most RMSE above the champion's on the same rows, surely, as max_auc_drop (rating)."
    )
    slices: tuple[str, ...] = Field(
        (), description="Fields whose values are compared with the champion one by one: categorical or multi (click)."
    )
    slice_min_samples: int = Field(500, ge=2, description="Test samples of a value that is compared.")
    slice_max_auc_drop: float = Field(0.05, ge=0, le=1, description="As max_auc_drop, among the samples of a value.")
    max_psi: Positive = Field(
        0.5, description="Most population stability index of a field, the day against the days before."
    )
    max_new_share: float = Field(
        1.0, ge=0, le=1, description="Most of a field's values in the day that no day before had."
    )
    max_missing_share: float = Field(
        0.2, ge=0, le=1, description="Most by which the share of a field's rows without a value may grow in the day."
    )
    max_load: float = Field(1.0, gt=0, le=1, description="Most load of the index of rows, as the report has it.")
    max_rows: int = Field(0, ge=0, description="Most rows over all workers when training ends; 0: any number.")
    max_evicted_share: float = Field(1.0, ge=0, le=1, description="Most rows evicted in training / rows admitted.")
    reference: str = Field(
        "",
        pattern=r"^(\d*|none)$",
        description="A version that the candidate is compared with as well, because drops within max_auc_drop add up "
        "from day to day. Empty: in a day's run, the champion of a week before, if there was one. none: no other.",
    )
    on_schema_change: Literal["keep", "absolute"] = Field(
        "keep", description="A champion that cannot score the rows stays, or the other bounds alone decide."
    )

    @model_validator(mode="after")
    def _bounds_agree(self) -> GateConfig:
        if self.min_calibration > self.max_calibration:
            raise ValueError(
                f"min_calibration = {self.min_calibration:g} is above max_calibration = {self.max_calibration:g}; "
                "swap them"
            )
        twice = sorted({name for name in self.slices if self.slices.count(name) > 1})
        if twice:
            raise ValueError(f"slices: {twice[0]} is named twice; name each field once")
        return self


class EvalConfig(Section):
    """What judges a day's candidate."""

    tail: float = Field(
        0.1, gt=0, lt=1, description="Last share of a day, by event time, that is kept from training and judged on."
    )


class RecurringConfig(Section):
    """How a day's run goes on from the days before it."""

    epochs: int = Field(1, ge=1, description="Passes over the new rows.")
    wait_hours: NonNegative = Field(0.0, description="How long a run waits for its day's logs.")
    on_missing: Literal["skip", "fail"] = Field(
        "skip", description="A day whose logs did not come: absent, or an error."
    )
    max_days: int = Field(30, ge=1, description="Days back from the run's own that it ingests and trains on at most.")
    allowed_lateness: NonNegative = Field(
        24.0, description="Hours that a row's time may lie before its day or after it; others are quarantined."
    )


class ClusterConfig(Section):
    """Where workers run."""

    backend: Literal["local", "pytorchjob"] = Field("local", description="Local processes, or a PyTorchJob.")
    image: str = Field("", description="Image of steps and workers; empty: the environment's DES_IMAGE.")
    nodes: int = Field(1, ge=1, description="Pods of the job.")
    nproc_per_node: int = Field(1, ge=1, description="Workers in each pod.")
    cpu: str = Field("1", pattern=r"^(\d+(\.\d+)?|\d+m)$", description="CPUs of each pod, as Kubernetes writes them.")
    memory: str = Field(
        "4Gi", pattern=r"^\d+(\.\d+)?([KMGT]i|[kMGT])?$", description="Memory of each pod, as Kubernetes writes it."
    )
    gpus: int = Field(0, ge=0, description="GPUs (nvidia.com/gpu) of each pod.")
    queue: str = Field("", description="Kueue's local queue; empty: none.")
    queue_timeout_s: Positive = Field(3600.0, description="Seconds a job may wait in its queue.")
    deadline_s: Positive = Field(86_400.0, description="Seconds a job may run.")
    elastic: bool = Field(False, description="Pods may leave and join; training goes on from the last checkpoint.")

    @field_validator("cpu", mode="before")
    @classmethod
    def _cpus_may_be_a_number(cls, cpu: Any) -> Any:
        return str(cpu) if isinstance(cpu, int | float) and not isinstance(cpu, bool) else cpu


class NotifyConfig(Section):
    """Who is told of a run's end."""

    webhook: str = Field(
        "", description="Address that a JSON of the outcome is posted to; empty: DES_WEBHOOK, or none."
    )


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
        """sha256 of what decides the model: not where it is stored or registered, nor by what bounds it is judged."""
        content = self.model_dump(mode="json", exclude={"storage", "registry", "cluster", "notify", "gate"})
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
        content["seed"] = self.run.seed
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def weights_form(self) -> dict[str, Any]:
        """What weights must have been trained with to be gone on from, beside the fields."""
        return {
            "model": self.model.model_dump(mode="json", exclude={"init", "dropout"}),
            "optimizer": {"rows.name": self.optimizer.rows.name, "dense.name": self.optimizer.dense.name},
            "precision": self.train.precision,
        }

    @property
    def features_digest(self) -> str:
        """sha256 of what decides the feature store, given the raw logs."""
        content = self.model_dump(mode="json", include={"source", "split", "fields"})
        content["source"].pop("ready")
        content["allowed_lateness"] = self.recurring.allowed_lateness
        content["seed"] = self.run.seed
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
        raise ConfigError(f"{origin}: {explain(error, Config, document)}") from None

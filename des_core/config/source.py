"""The raw logs and how they are divided: [source], [[source.join]], [split]."""

from __future__ import annotations

import datetime
import json
import re
import zoneinfo
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from des_core.config.section import Section


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

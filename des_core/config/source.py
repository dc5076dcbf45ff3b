"""The raw logs and how they are divided: [source], [[source.join]], [split]."""

from __future__ import annotations

import codecs
import datetime
import json
import re
import zoneinfo
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from des_core.config.section import Section


class JoinConfig(Section):
    """A side table joined to every record of the log (left join; unmatched records get missing values)."""

    path: str = Field(description="Side table: CSV with a header line, or Parquet; it is read whole into memory.")
    on: str = Field(description="Column that both tables have; its values must be unique in the side table.")
    columns: tuple[str, ...] = Field((), description="Columns to take from the side table; empty: all.")


class SourceConfig(Section):
    """The raw logs."""

    format: Literal["csv", "criteo", "libsvm", "parquet", "synthetic"] = Field(
        "csv", description="File format of the raw logs; gzip and zstd are recognised by the files' endings."
    )
    path: str | tuple[str, ...] = Field(
        (), description="File, glob pattern, folder, or a list of these; {day} in it stands for a date like 2026-01-31."
    )
    train: str | tuple[str, ...] = Field((), description="Logs to train on; give either these or path.")
    valid: str | tuple[str, ...] = Field(
        (), description="Logs to validate on, beside train; empty: a seeded share of train."
    )
    test: str | tuple[str, ...] = Field((), description="Logs to test on, beside train.")
    delimiter: str = Field(",", min_length=1, max_length=1, description="csv: character between the columns.")
    quoting: Literal["minimal", "none"] = Field(
        "minimal",
        description='csv: what a double quote at the beginning of a value means. "minimal": the value goes on to the '
        'closing quote, over delimiters and line ends. "none": it is a letter like any other, as in most tab-separated '
        "logs.",
    )
    header: bool | tuple[str, ...] = Field(
        True, description="Whether the first line names the columns; for files without such a line, the list of names."
    )
    encoding: str = Field("utf-8", description="Character encoding of text logs, such as latin-1, gb18030 or utf-16.")
    missing: tuple[str, ...] = Field(("", "NA"), description="Texts that stand for a missing value.")
    timezone: str = Field("UTC", description="Time zone of days, hours and weekdays, and of times that name no zone.")
    label: str = Field("label", description="Column with the label.")
    positive: str = Field(
        "", description='Comparison that makes the label 1, like ">= 4"; empty: the label is 0 or 1 already.'
    )
    task: Literal["click", "rating"] = Field(
        "click", description="Loss that is minimised: log loss of a click, or squared error of a rating."
    )
    ready: str = Field(
        "", description='File that marks the logs of a day as complete, like "logs/{day}/_SUCCESS"; empty: none.'
    )
    time: str = Field("", description="Column with the time of the event.")
    time_format: str = Field(
        "",
        description="Form of source.time: unix, unix_ms, unix_us, iso, or a strptime pattern like %y%m%d%H; empty: "
        "ISO 8601 or Unix seconds, milliseconds or microseconds, as the values are.",
    )
    group: str = Field("", description="Column whose values are the groups of GAUC, usually the user.")
    join: tuple[JoinConfig, ...] = Field((), description="Side tables joined to the log.")
    days: int = Field(3, ge=1, le=366, description="synthetic: number of days of logs, the first being 2026-01-01.")
    rows_per_day: int = Field(20_000, ge=1, description="synthetic: number of rows of each day.")
    max_bad_share: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Share of bad rows above which ingestion fails; up to it they are put into a file of their own.",
    )

    @field_validator("positive")
    @classmethod
    def _positive_compares(cls, text: str) -> str:
        number, value = r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", r"\S.*"
        if text.strip() and not re.fullmatch(rf"\s*((>=|<=|>|<)\s*{number}|(==|!=)\s*{value})\s*", text):
            raise ValueError(f'{text!r} is not a comparison; write it like ">= 4" or "== click"')
        return text

    @field_validator("time_format")
    @classmethod
    def _time_format_is_known(cls, text: str) -> str:
        if text in ("", "iso", "unix", "unix_ms", "unix_us") or "%" in text:
            return text
        raise ValueError(f"{text!r} is no form of times; write unix, unix_ms, unix_us, iso or a pattern like %y%m%d%H")

    @field_validator("encoding")
    @classmethod
    def _encoding_is_known(cls, name: str) -> str:
        try:
            return codecs.lookup(name).name
        except LookupError:
            raise ValueError(f"{name!r} is not an encoding known here; write it like latin-1 or gb18030") from None

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
        "", description="How rows are divided; empty: by time where source.time is set, else at random."
    )
    valid: float | str | tuple[str, ...] = Field(
        0.1,
        description="Share of the rows to validate on; by day: a number of days (default 1) or dates. In "
        "time they come before test.",
    )
    test: float | str | tuple[str, ...] = Field(
        0.1, description="Share of the rows, or days, to test on, as valid; the last ones in time."
    )

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

"""The inputs of the model: [[fields]]."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from des_core.config.section import Section
from des_core.contracts import WEIGHT


class FieldConfig(Section):
    """One input of the model, made from one column of the log."""

    name: str = Field(min_length=1, description="Name of the field.")
    column: str = Field("", description="Column of the log; empty: the field's name.")
    kind: Literal["categorical", "multi", "numeric"] = Field(
        "categorical", description="One value, a list of values, or a number; it is never guessed from the values."
    )
    separator: str = Field("|", min_length=1, description="multi: character between the values.")
    weight: str = Field(
        "", description="Column with the weight of the value; multi: a list of weights with the same separator."
    )
    pooling: Literal["sum", "mean", "sqrtn"] = Field(
        "sum",
        description="multi: how the rows of the n values are combined: their sum, or that divided by n or by sqrt(n).",
    )
    transform: Literal["", "log1p", "standard", "bucket"] = Field(
        "",
        description="numeric: how the number is changed: sign(x) log(1+|x|), to zero mean and unit variance, "
        "or to one of 32 quantile buckets.",
    )
    derive: str = Field(
        "",
        description="Value made from the column: hour, weekday or year of a time, or regex:PATTERN (its "
        "first group; multi: all matches).",
    )
    form: Literal["", "text", "whole", "number", "boolean"] = Field(
        "", description="Type that the values are brought to; empty: decided by the first values that are ingested."
    )
    cross: tuple[str, ...] = Field(
        (),
        description="Names of other categorical fields, such as ['user', 'category']: this field's value is the "
        "combination of theirs. A missing part counts as a value; where all are missing, so is the combination.",
    )
    wide: bool = Field(
        False,
        description="Only the model's linear part reads the field, as crosses in Wide & Deep; needs a model with one: "
        "lr, fm, fwfm, wide_deep, deepfm, fibinet.",
    )
    table: str = Field(
        "", description="Fields that name the same table share its rows; empty: a table of the field's own."
    )
    input: Literal["rows", "dense"] = Field(
        "rows",
        description="numeric: the number scales a row of its own, or goes into the dense layers as it is (0 "
        "where it is missing).",
    )

    @model_validator(mode="after")
    def _options_fit(self) -> FieldConfig:
        if self.name.startswith(("_", WEIGHT)):
            raise ValueError(f"a name must not begin with _ or {WEIGHT}; rename it and set column")
        if self.transform and self.kind != "numeric":
            raise ValueError("transform needs kind = 'numeric'")
        if self.input == "dense" and (self.kind != "numeric" or self.transform == "bucket" or self.table):
            raise ValueError("input = 'dense' needs kind = 'numeric', no buckets and no table")
        if self.cross:
            self._check_cross()
        if self.wide and self.input == "dense":
            raise ValueError("wide is for fields with rows; a dense input has a linear weight already")
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

    def _check_cross(self) -> None:
        set_too = [key for key in ("column", "weight", "derive", "form") if getattr(self, key)]
        if set_too:
            raise ValueError(f"cross makes the value from other fields; remove {set_too[0]}, which is for a column")
        if self.kind != "categorical":
            raise ValueError("cross needs kind = 'categorical': a combination is one value")
        if len(set(self.cross)) < max(2, len(self.cross)):
            raise ValueError("cross must name at least two fields, each once")

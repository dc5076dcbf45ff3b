"""Which values own rows: [table]."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from des_core.config.section import Section


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

"""Which values own rows: [table]."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from des_core.config.section import EXPERT, Section


class TableConfig(Section):
    """Which values own rows, decided on the steps' own clock: the same rows for any number of workers."""

    admit_count: int = Field(
        1, ge=1, description="Give a value its row at this occurrence in training; until then it contributes zero."
    )
    admit_probability: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Give a value its row with this probability at each step that looks it up; not with admit_count.",
        json_schema_extra=EXPERT,
    )
    rows: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="Numbers of rows in memory; bf16: half the memory, rounded by a seeded draw that is right in the "
        "mean, with train.kernels = triton; optimizer state stays in fp32.",
        json_schema_extra=EXPERT,
    )
    max_rows: int = Field(0, ge=0, description="Most rows over all workers after an eviction; 0: no limit.")
    budget_keeps: Literal["frequent", "recent"] = Field(
        "frequent",
        description="Which rows max_rows keeps: those looked up most often, or those looked up last.",
        json_schema_extra=EXPERT,
    )
    idle_steps: int = Field(
        0, ge=0, description="Evict rows that no sample has looked up for more than this many steps; 0: never."
    )
    idle_days: int = Field(
        0,
        ge=0,
        description="Evict rows that no sample has looked up for more than this many days of source.time; 0: never.",
    )
    evict_zero: bool = Field(False, description="Evict rows whose weights are all zero (see group_ftrl).")
    evict_every: int = Field(
        1000, ge=1, description="Steps between evictions; idle_days evicts at the end of a day instead."
    )

    @model_validator(mode="after")
    def _one_admission(self) -> TableConfig:
        if self.admit_count > 1 and self.admit_probability < 1:
            raise ValueError("admit_count and admit_probability are two ways to admit; set one of them")
        return self

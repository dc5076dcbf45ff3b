"""A day's run: [recurring], and the rows that judge it: [eval]."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from des_core.config.section import NonNegative, Section


class EvalConfig(Section):
    """What judges a day's candidate."""

    tail: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="Share of a day's rows, the last by event time, that is kept from training and used to judge.",
    )


class RecurringConfig(Section):
    """How a day's run continues from the days before it."""

    epochs: int = Field(1, ge=1, description="Passes over the rows that are new.")
    wait_hours: NonNegative = Field(0.0, description="Hours that a run waits for its day's logs.")
    on_missing: Literal["skip", "fail"] = Field(
        "skip", description="What happens where a day's logs did not come: the run ends without work, or with an error."
    )
    max_days: int = Field(
        30, ge=1, description="Most days, up to and including the run's own, that it ingests and trains on."
    )
    allowed_lateness: NonNegative = Field(
        24.0, description="Hours that a row's time may lie before its day or after it; others are quarantined."
    )

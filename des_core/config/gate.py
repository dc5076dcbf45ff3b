"""When a candidate becomes champion: [gate]."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from des_core.config.section import NonNegative, Positive, Section


class GateConfig(Section):
    """When a candidate becomes champion. Bounds on the click metrics and on drift judge the day's data as well."""

    min_auc: float = Field(0.5, ge=0, le=1, description="click: least AUC on the test rows.")
    max_auc_drop: float = Field(
        0.015,
        ge=0,
        le=1,
        description="How far the candidate's AUC may lie below the champion's on the same rows. The whole 95 % "
        "interval of the difference must lie above minus this. 2,000 rows tell two warm-started models apart to about "
        "0.01; set less for larger tails.",
    )
    min_samples: int = Field(
        100, ge=1, description="Test samples below which the verdict is inconclusive and the champion stays."
    )
    max_logloss: Positive = Field(1e9, description="click: most log loss, in nats.")
    max_ne: Positive = Field(
        1.0,
        description="click: most normalised entropy; above 1, predicting the mean label for every row would be better.",
    )
    min_calibration: NonNegative = Field(0.0, description="click: least ratio of predicted to observed clicks.")
    max_calibration: Positive = Field(1e9, description="click: most ratio of predicted to observed clicks.")
    max_rmse: float = Field(1e9, gt=0, description="rating: most RMSE on the test rows.")
    max_rmse_rise: float = Field(
        0.01,
        ge=0,
        description="rating: how far the RMSE may lie above the champion's on the same rows, judged as max_auc_drop.",
    )
    slices: tuple[str, ...] = Field(
        (),
        description="click: categorical or multi fields of whose values each is compared with the champion by itself.",
    )
    slice_min_samples: int = Field(500, ge=2, description="Least test samples of a value that is compared by itself.")
    slice_max_auc_drop: float = Field(
        0.05,
        ge=0,
        le=1,
        description="How far the AUC among a value's samples may lie below the champion's, judged as max_auc_drop.",
    )
    max_psi: Positive = Field(
        0.5, description="Most population stability index (PSI) of a field, of the day against the days before."
    )
    max_new_share: float = Field(
        1.0, ge=0, le=1, description="Most share of a field's values in the day that no day before had."
    )
    max_missing_share: float = Field(
        0.2, ge=0, le=1, description="Most increase, in the day, of the share of rows in which a field has no value."
    )
    max_load: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Most load (share of entries in use) of the hash index of rows, as the report shows it.",
    )
    max_rows: int = Field(0, ge=0, description="Most rows over all workers when training ends; 0: no limit.")
    max_evicted_share: float = Field(
        1.0, ge=0, le=1, description="Most ratio of rows evicted to rows admitted in training."
    )
    reference: str = Field(
        "",
        pattern=r"^(\d*|none)$",
        description="A version that the candidate is compared with as well, because drops within max_auc_drop add up "
        "from day to day. Empty: in a day's run, the champion of a week before, if there was one. none: no other.",
    )
    on_schema_change: Literal["keep", "absolute"] = Field(
        "keep",
        description="What happens where the champion cannot score the rows: it stays, or the other bounds "
        "alone decide.",
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

"""What judging a model writes: the champion's scores, its scores of a day's new rows, and the verdict."""

from __future__ import annotations

from typing import Literal

from des_core.contracts import Record

Outcome = Literal["accept", "reject", "inconclusive", "not_comparable"]


class Check(Record):
    """One bound."""

    name: str
    """Its key in [gate]; of a field's drift and of the reference with what it is of."""
    value: float
    bound: float
    kept: bool
    about: str
    """One line for a person."""


class Drift(Record):
    """A field's drift in the day."""

    field: str
    psi: float
    new_share: float
    missing_share: float
    missing_before: float
    kept: bool


class Slice(Record):
    """The rows of one value."""

    field: str
    value: str
    samples: int
    auc: float
    champion_auc: float
    difference: float
    low: float
    """Lower end of the difference's 95 % interval."""
    kept: bool


class Champion(Record):
    """``champion.json``: the champion's scores of the candidate's test rows are in ``champion.parquet``."""

    status: Literal["none", "scored", "not_comparable"]
    version: str = ""
    """Version in the registry, empty where there is no champion."""
    reason: str = ""
    """Why it is not comparable."""
    report: str
    """Reference of the report whose rows were scored."""
    reference: str = ""
    """Version of gate.reference, or of a week before, whose scores of the same rows are in ``reference.parquet``."""
    reference_reason: str = ""
    """Why the reference could not score them, or empty."""
    reference_given: bool = True
    """Whether the config names it; else it is the champion of a week before, without which the verdict is made too."""
    scores_sha256: str = ""
    """Of ``champion.parquet``, where the status is "scored"."""
    reference_sha256: str = ""
    """Of ``reference.parquet``, where the reference scored them."""


class NewRows(Record):
    """``new_rows.json``: the pinned champion on a day's new rows, before anything was trained on them."""

    as_of: str = ""
    version: str = ""
    """The champion; empty where there is none, or where it could not score the rows."""
    reason: str = ""
    """Why the champion could not score them."""
    samples: int = 0
    metrics: dict[str, float] = {}
    """Over all new rows: auc, logloss, ne, calibration, or rmse; as far as the rows show them."""
    days: dict[str, dict[str, float]] = {}
    """Day -> samples and metrics of its rows."""
    accepted: tuple[str, ...] = ()
    """Days of the window whose data a person took nevertheless: nothing more is said against them."""
    scores_sha256: str = ""
    """Of ``new_rows.parquet``, where there is a version."""
    drift: dict[str, dict[str, float]] = {}
    """Field -> psi, new_share, missing_share, missing_before: the run's day against the days before it."""


class Verdict(Record):
    """``gate.json``: what the gate decided, and why."""

    accepted: bool
    verdict: Outcome
    reasons: tuple[str, ...]
    """One line each; the first one decided."""
    metrics: dict[str, float]
    champion: str = ""
    """Version of the champion that was compared, or empty."""
    reference: str = ""
    """Version of gate.reference, or empty."""
    inputs: str = ""
    """Reference of the champion's record, which names the report and the scores."""
    new_rows: str = ""
    """Reference of the day's record of its new rows."""
    bounds: str = ""
    """``Config.verdict_digest`` of the bounds."""
    data_at_fault: bool = False
    days_at_fault: tuple[str, ...] = ()
    """Days whose data are the reason."""
    intervals: dict[str, tuple[float, float]] = {}
    """The 95 % interval of a metric, by its name."""
    checks: tuple[Check, ...] = ()
    slices: tuple[Slice, ...] = ()
    drift: tuple[Drift, ...] = ()

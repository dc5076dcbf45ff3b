"""What judging a model writes: what workers are asked to compare and what they found, and the verdict."""

from __future__ import annotations

from typing import Literal

from des_core.contracts import Record

Outcome = Literal["accept", "reject", "inconclusive", "not_comparable"]

Interval = tuple[float, float]
"""The 95 % interval of a number: low, high."""


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


class SliceDifference(Record):
    """The rows of one value, as two models score them."""

    field: str
    value: str
    samples: int
    auc: float
    champion_auc: float
    difference: float
    low: float
    """Lower end of the difference's 95 % interval."""


class Slice(SliceDifference):
    """The same by the gate's bound."""

    kept: bool


class Measured(Record):
    """One model on rows."""

    samples: int
    positives: int
    """Of clicks."""
    labels: Interval | None = None
    """The least and the greatest; None without rows."""
    broken: int = 0
    """Scores that are not finite; with any there are no metrics."""
    metrics: dict[str, float] = {}
    """auc, logloss, ne, calibration, or rmse; as far as the rows show them."""
    intervals: dict[str, Interval] = {}
    """Of these, by groups of rows where they have any."""


class Comparison(Record):
    """The candidate beside another version on the test rows that both scored."""

    theirs: Measured
    """The other version on these rows; without metrics where they cannot decide, and then nothing follows."""
    difference: float = 0.0
    """AUC (rating: RMSE) of the candidate - that of the other."""
    interval: Interval = (0.0, 0.0)
    by_rows: Interval | None = None
    """The interval as if all rows were independent, where ``interval`` is by groups."""
    groups: int | None = None
    """Of rows that are not independent."""
    roc: list[list[float]] = []
    """The other's curve and bins, as the report draws them."""
    calibration_bins: list[dict[str, float]] = []
    slices: dict[str, tuple[SliceDifference, ...]] = {}
    """Field -> its most frequent values, the most frequent first."""


class Opponent(Record):
    """A version of the model that workers are asked to score rows with."""

    version: str
    inputs: str
    """Address of its run's inputs.json, which has its config."""
    checkpoint: str
    """Reference of its weights."""
    dataset: str
    """Reference of the rows with its own fields: the run's own, or the raw logs ingested again."""
    split: str = "test"
    """Of that dataset, where its rows are others than the run's; they are then joined by sample."""
    joined: bool = False
    after: tuple[str, int] | None = None
    """A day and an event time in it: earlier rows it may have seen."""


class Asked(Record):
    """``evaluate-asked.json``, ``score-asked.json``: what the workers of a role are to compare."""

    opponents: dict[str, Opponent]
    """By what they are: champion, reference."""
    slices: tuple[str, ...] = ()
    """Fields by whose values the champion is compared too."""
    training: str = ""
    """sha256 of the candidate's training.json."""


class Found(Record):
    """``evaluate-found.json``: what the workers found of those that they were asked for."""

    asked: str
    """sha256 of the record that asked."""
    comparisons: dict[str, Comparison] = {}
    reasons: dict[str, str] = {}
    """Why an opponent could not score the rows."""


class FoundNew(Record):
    """``score-found.json``: the champion on a day's new rows."""

    asked: str
    reason: str = ""
    samples: int = 0
    metrics: dict[str, float] = {}
    days: dict[str, dict[str, float]] = {}


class Champion(Record):
    """``champion.json``: the champion on the candidate's test rows."""

    status: Literal["none", "scored", "not_comparable"]
    version: str = ""
    """Version in the registry, empty where there is no champion."""
    reason: str = ""
    """Why it is not comparable."""
    report: str
    """Reference of the report whose rows were scored."""
    reference: str = ""
    """Version of gate.reference, or of a week before, that the candidate is compared with too."""
    reference_reason: str = ""
    """Why the reference could not score them, or empty."""
    reference_given: bool = True
    """Whether the config names it; else it is the champion of a week before, without which the verdict is made too."""
    comparison: Comparison | None = None
    """Where the status is "scored"."""
    reference_comparison: Comparison | None = None
    """Where the reference scored them."""
    slices: tuple[str, ...] = ()
    """Fields by whose values the champion was compared."""


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

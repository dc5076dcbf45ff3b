"""The champion's scores: of a day's new rows before anything is trained on them, and of the test rows.

Workers make them, from its checkpoint and with its own run's config; here it is said what they compare, and what they
found becomes champion.json and new_rows.json. A champion sees the rows through its own field definitions. Where the
run's feature store holds all of its columns, it reads them there; where its fields were defined differently, the raw
logs are ingested again with its definitions into a scratch folder, and the samples that both have are joined by their
ids. A champion that needs a column which the logs no longer have, or whose weights are gone, cannot be compared.

A day's run scores with the champion that was pinned, whoever is champion by then: the new rows are all rows of its
window, which no model of this line was trained on. The reference must not have seen the test rows either: a version
that gate.reference names, or in a day's run the champion's forerunner of a week before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date, timedelta
from typing import Any, Literal, NamedTuple

from des_core import storage
from des_core.config import Config, FieldConfig, StorageConfig, parse_config
from des_core.contracts import Dataset, FieldSpec, Reference, Segment
from des_core.data.store import drift
from des_core.errors import ConfigError, DataError, StorageError, UserError
from des_core.release.registry import registry
from des_core.release.registry.lineage import Link
from des_core.run import Day, Run, under_root
from des_core.verdict import Asked, Champion, Found, FoundNew, NewRows, Opponent

STORED = ("name", "column", "kind", "separator", "weight", "derive", "form", "cross")
"""What decides a field's columns in the feature store: statistics and pooling are applied when they are read."""

REFERENCE_DAYS = 7
"""Between a day's run and the champion that it is compared with beside the present one."""

Launch = Callable[[], None]
"""Has the workers do what was asked of them."""


def score(run: Run, launch: Launch) -> tuple[Reference, bool]:
    """``champion.json`` of the run, and whether it was there already.

    It is kept where it is of this report and of the run's champion: of a day the pinned one. Of a run over whole
    logs it is the present one, and what is registered is kept too: its verdict is then a fact, and the champion may
    well be the run's own model.

    Args:
        launch: runs the role evaluate, which writes the report too where it is missing.

    Raises:
        UserError: the champion or gate.reference is not in the registry, or the latter has seen the test rows.
    """
    present, own = (run.day.champion, "") if run.day is not None else registry.standing(run)[:2]
    referred, given = _reference(run)
    if storage.exists(run.path("champion.json")) and not storage.exists(run.path("report.json")):
        # The report that it is of may be made again as it was.
        _forget(run, "evaluate")
        launch()
    known = _known(run)
    if known is not None and not own and known.version != present:
        known = None
    if known is not None and known.reference == referred and _has_slices(run, known):
        return run.reference("champion.json"), True
    version = present if known is None else known.version
    with _asked(run, {"champion": version, "reference": referred}, given) as asked:
        found = _found(run, asked, launch)
    record = Champion(
        status=_status(version, found),
        version=version,
        reason=found.reasons.get("champion", ""),
        report=str(run.reference("report.json")),
        reference=referred,
        reference_reason=found.reasons.get("reference", ""),
        reference_given=given,
        comparison=found.comparisons.get("champion"),
        reference_comparison=found.comparisons.get("reference"),
        slices=run.config.gate.slices,
    )
    written = record.write(run.path("champion.json"))
    _forget(run, "evaluate")
    return written, False


def _status(version: str, found: Found) -> Literal["none", "scored", "not_comparable"]:
    if not version:
        return "none"
    return "scored" if "champion" in found.comparisons else "not_comparable"


def _has_slices(run: Run, known: Champion) -> bool:
    """Whether the champion was compared by all fields in gate.slices, or could not be at all."""
    return known.status != "scored" or set(run.config.gate.slices) <= set(known.slices)


def _reference(run: Run) -> tuple[str, bool]:
    """The version that is compared as well, and whether the config names it."""
    named = run.config.gate.reference
    if named:
        return named.removeprefix("none"), True
    if run.day is None or not run.day.champion:
        return "", False
    week_ago = (date.fromisoformat(run.day.as_of) - timedelta(days=REFERENCE_DAYS)).isoformat()
    champion = f"models:/{run.config.run.name}/{run.day.champion}"
    for link in registry.chain(champion, run.config.registry.tracking_uri):
        if link.as_of and link.as_of <= week_ago:
            # The champion itself, where it is that old, is compared already.
            return ("" if link.version == run.day.champion else link.version), False
    return "", False


def _known(run: Run) -> Champion | None:
    """champion.json, if it is of the report that is there."""
    if not all(storage.exists(run.path(name)) for name in ("champion.json", "report.json")):
        return None
    try:
        record = Champion.load(run.reference("champion.json"))
    except StorageError:
        return None
    return record if record.report == str(run.reference("report.json")) else None


def is_whole(run: Run) -> bool:
    """Whether the records of this run's comparisons are there, and of its report."""
    return _known(run) is not None and (run.day is None or _known_new_rows(run))


def score_new(run: Run, launch: Launch) -> tuple[Reference, bool]:
    """``new_rows.json`` of a day's run, and whether it was there already.

    It has the pinned champion's metrics on every row of the window. Without a champion there is the day's drift only.

    Args:
        launch: runs the role score.

    Raises:
        UserError: the pinned champion is not in the registry.
    """
    day = run.day
    if day is None:
        raise UserError(f"{run.folder}: this run is over whole logs, only a day's run has new rows")
    if _known_new_rows(run):
        return run.reference("new_rows.json"), True
    record = NewRows(as_of=day.as_of)
    if day.champion:
        found = _new_rows(run, day.champion, launch)
        record = NewRows(
            as_of=day.as_of,
            version="" if found.reason else day.champion,
            reason=found.reason,
            samples=found.samples,
            metrics=found.metrics,
            days=found.days,
        )
    root = run.dataset.uri.rpartition("/")[0]
    earlier = [name for name in storage.list_folder(root) if name < day.as_of and name not in day.left_out]
    measured = drift.measure(
        root, Dataset.load(run.dataset).fields, day.as_of, earlier[-run.config.recurring.max_days :]
    )
    changes = {"drift": measured, "accepted": day.accepted}
    written = record.model_copy(update=changes).write(run.path("new_rows.json"))
    _forget(run, "score")
    return written, False


def _known_new_rows(run: Run) -> bool:
    """Whether the day's record is there."""
    if not storage.exists(run.path("new_rows.json")):
        return False
    try:
        NewRows.load(run.reference("new_rows.json"))
    except StorageError:
        return False
    return True


class _Question(NamedTuple):
    """What workers are asked, and why some versions are not asked about."""

    asked: Asked
    reasons: dict[str, str]


@contextmanager
def _asked(run: Run, versions: dict[str, str], given: bool = True) -> Iterator[_Question]:
    """What is asked of the role evaluate; what was made for it is gone after the block."""
    opponents: dict[str, Opponent] = {}
    reasons: dict[str, str] = {}
    try:
        for role, version in versions.items():
            if not version:
                continue
            try:
                opponents[role] = _opponent(run, version)
            except _NotComparableError as error:
                reasons[role] = str(error)
            except (UserError, StorageError) as error:
                # The run does without a reference that nobody asked for.
                if role == "champion" or given:
                    raise
                reasons[role] = str(error)
        training = storage.digest_file(run.path("training.json")) if storage.exists(run.path("training.json")) else ""
        yield _Question(Asked(opponents=opponents, slices=run.config.gate.slices, training=training), reasons)
    finally:
        for version in filter(None, versions.values()):
            storage.delete(_seen_by(run, version))
        storage.delete(_scratch(run))


def _found(run: Run, question: _Question, launch: Launch) -> Found:
    """What the workers found; they are not asked where nothing is to be found."""
    asked, reasons = question
    report_is_there = storage.exists(run.path("report.json"))
    if not asked.opponents:
        _forget(run, "evaluate")
        if not report_is_there:
            launch()
        return Found(asked="", reasons=reasons)
    answer = _answer(run, "evaluate", asked, launch, report_is_there)
    found = Found.load(answer)
    return found.model_copy(update={"reasons": found.reasons | reasons})


def _new_rows(run: Run, version: str, launch: Launch) -> FoundNew:
    """What the workers found of the champion on the new rows."""
    try:
        opponent = _opponent(run, version)
        return FoundNew.load(_answer(run, "score", Asked(opponents={"champion": opponent}), launch))
    except _NotComparableError as error:
        return FoundNew(asked="", reason=str(error))
    finally:
        storage.delete(_seen_by(run, version))
        storage.delete(_scratch(run))


def _answer(run: Run, role: str, asked: Asked, launch: Launch, again: bool = True) -> Reference:
    """The workers' answer to this very question; an earlier attempt may have left it.

    Raises:
        StorageError: they answered another one.
    """
    uri = run.path(f"{role}-found.json")
    reference = asked.write(run.path(f"{role}-asked.json"))
    if not (again and _is_answer(uri, reference)):
        storage.delete(uri)
        launch()
    if not _is_answer(uri, reference):
        raise StorageError(f"{uri} does not answer {reference.uri}; run the same again")
    return run.reference(f"{role}-found.json")


def _is_answer(uri: str, asked: Reference) -> bool:
    try:
        return storage.exists(uri) and bool(storage.read_json(uri)["asked"] == asked.sha256)
    except (StorageError, KeyError, TypeError):
        return False


def _forget(run: Run, role: str) -> None:
    """A question whose answer is on record is asked no more."""
    for name in ("asked", "found"):
        storage.delete(run.path(f"{role}-{name}.json"))


class _NotComparableError(Exception):
    """A version cannot score the run's rows; the message is why."""


def _opponent(run: Run, version: str) -> Opponent:
    """What workers need to know of a version.

    Raises:
        RegistryError: there is no such version.
        ConfigError: as a reference it may have seen the rows.
        _NotComparableError: it cannot score the rows.
    """
    link = registry.version(f"models:/{run.config.run.name}/{version}", run.config.registry.tracking_uri)
    inputs = storage.join(run.config.storage.root, "runs", link.run_key[:12], "inputs.json")
    pinned: dict[str, Any] = storage.read_json(inputs) if link.run_key and storage.exists(inputs) else {}
    began = Day.model_validate(pinned["day"]) if pinned.get("day") else None
    if run.day is not None and version != run.day.champion:
        _check_unseen(run.day, version, began)
    try:
        checkpoint = _checkpoint(run, version, link)
        if not pinned:
            raise UserError(f"its run {inputs} is gone, which says what it was trained with")
        config = parse_config(json.dumps(pinned["config"]), inputs)
        fields = _fields(inputs)
        after = _after(run.day, began)
        dataset, split, joined = run.dataset, "test", not _has_columns(run, config, fields)
        if joined:
            dataset, split = _ingested_again(run, config, fields)
        else:
            known = Dataset.load(run.dataset)
            dataset = known.model_copy(update={"fields": fields}).write(_seen_by(run, version))
    except UserError as error:
        raise _NotComparableError(str(error)) from None
    return Opponent(
        version=version,
        inputs=inputs,
        checkpoint=str(checkpoint),
        dataset=str(dataset),
        split=split,
        joined=joined,
        after=after,
    )


def _checkpoint(run: Run, version: str, link: Link) -> Reference:
    """The reference of a version's weights, whose manifest is there."""
    if not link.checkpoint:
        raise UserError(f"version {version} has no tag des.checkpoint, which names its weights")
    reference = under_root(run.config, link.checkpoint)
    if not storage.exists(reference.uri):
        raise UserError(f"its checkpoint {reference.uri} is gone")
    return reference


def _fields(inputs: str) -> tuple[FieldSpec, ...]:
    """What a model's fields are, with the statistics that its weights know, from its run's report."""
    uri = inputs.removesuffix("inputs.json") + "report.json"
    try:
        return tuple(FieldSpec.model_validate(field) for field in storage.read_json(uri)["dataset"]["definitions"])
    except (StorageError, KeyError, TypeError, ValueError):
        raise UserError(f"{uri}, which defines its fields, is missing, damaged or of another version") from None


def _check_unseen(day: Day, version: str, trained: Day | None) -> None:
    """A reference must not have been trained on rows that it is to judge.

    Raises:
        ConfigError: it was, or nobody knows.
    """
    if trained is None:
        raise ConfigError(
            f"gate.reference = {version}: no day's run in storage.root trained it, so it may have seen the rows that "
            "judge; choose a version of a day's run"
        )
    if trained.cut > day.cut:
        raise ConfigError(
            f"gate.reference = {version} was trained as of {trained.as_of} and may have seen rows of {day.as_of}; "
            "choose an earlier version"
        )


def _after(day: Day | None, trained: Day | None) -> tuple[str, int] | None:
    """The day and the time in it before which a version may have seen the rows; None: it has seen none.

    A window goes on where its weights end; training that starts from nothing takes the rows of before as well.
    """
    if day is None or day.checkpoint or not day.champion:
        return None
    if trained is None:
        raise UserError(
            f"version {day.champion}: no day's run in storage.root trained it, so it may have seen the rows"
        )
    return trained.as_of, trained.cut


def _has_columns(run: Run, config: Config, fields: tuple[FieldSpec, ...]) -> bool:
    """Whether the run's feature store has all that these fields read, made in their way."""
    here = {_stored(field) for field in Dataset.load(run.dataset).fields}
    theirs, ours = config.source, run.config.source
    same = (theirs.timezone, theirs.missing) == (ours.timezone, ours.missing)
    return same and all(_stored(field) in here for field in fields)


def _stored(field: FieldSpec) -> tuple[str, ...]:
    return tuple(str(getattr(field, key)) for key in STORED)


def _ingested_again(run: Run, config: Config, fields: tuple[FieldSpec, ...]) -> tuple[Reference, str]:
    """A feature store of the same logs with a version's fields, and the split with the rows: of a day all."""
    from des_core.data.read import sources
    from des_core.data.store import features
    from des_core.data.store.dataset import dataset_of
    from des_core.data.store.encoding import specs_of

    theirs = config.source
    keys = set(FieldConfig.model_fields)
    declared = tuple(FieldConfig(**field.model_dump(include=keys)) for field in fields)
    source = sources.source_of(run.config).model_copy(update={"timezone": theirs.timezone, "missing": theirs.missing})
    changes = {"fields": declared, "source": source, "storage": StorageConfig(root=_scratch(run))}
    config = run.config.model_copy(update=changes)
    if run.day is None:
        return _with_fields(features.ingest(config), fields), "test"
    wanted = {segment.part for segments in Dataset.load(run.dataset).splits.values() for segment in segments}
    files = features.day_files(config)
    if wanted - set(files):
        raise DataError(f"the logs of {', '.join(sorted(wanted - set(files)))} are gone")
    manifests = features.ingest_days(config, {day: files[day] for day in sorted(wanted)})
    segments = tuple(Segment(part=day, start=0, stop=made.part.rows) for day, made in manifests.items())
    splits: dict[str, tuple[Segment, ...]] = {"train": segments, "valid": (), "test": ()}
    root = config.features_root
    dataset = dataset_of(config, source, specs_of(declared), root, manifests, splits)
    return _with_fields(dataset.write(storage.join(root, "manifest.json")), fields), "train"


def _with_fields(dataset: Reference, fields: tuple[FieldSpec, ...]) -> Reference:
    """A dataset whose numbers mean what they meant to a version."""
    return Dataset.load(dataset).model_copy(update={"fields": fields}).write(dataset.uri)


def _seen_by(run: Run, version: str) -> str:
    """A data manifest of the run's rows with the fields of a version, beside the parts that it names."""
    return storage.join(run.dataset.uri.rpartition("/")[0], f"seen-by-{version}-{run.key[:12]}.json")


def _scratch(run: Run) -> str:
    """A feature store of this run alone."""
    return storage.join(run.folder, "champion-features")

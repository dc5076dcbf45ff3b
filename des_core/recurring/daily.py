"""A day of a recurring run: the days that it trains on and the champion that it continues from, pinned once.

    closed days      those up to the run's day whose logs are there, at most recurring.max_days back
    the window       closed days that the champion has not trained on, without those in quarantine
    the cut          event time that keeps the day's last rows from training: they judge

The champion's cut is the cursor: its own tail, the days of rejected candidates and days that came late all belong to
the next window. What was pinned is found again by name, day, config and the day parts' digests, so a retry reads it,
and the same day, config and data again are ``unchanged``::

    ROOT/days/2026-01-04/DIGEST.json        what was pinned for that day
    ROOT/days/2026-01-04/quarantine.json    why windows leave the day out
    ROOT/days/2026-01-04/accepted.json      a person takes it nevertheless
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime, timedelta
from zoneinfo import ZoneInfo

from des_core import log, storage
from des_core.config import Config
from des_core.contracts import Dataset, FieldSpec, Record
from des_core.data.store import features, windows
from des_core.data.store.digests import Digests
from des_core.data.store.parts import PartManifest, manifest_uri
from des_core.errors import ConfigError, DataError, NoLogsError, UserError
from des_core.release.registry import registry
from des_core.run import Day, Run, pin, relative_to_root, reopen, under_root

LEARNED = ("mean", "std", "edges", "form")
"""What a field takes from the data: it stays as the champion knows it."""


class Quarantine(Record):
    """``quarantine.json``: a day whose data are at fault."""

    day: str
    manifest: str
    """sha256 of the day's part as it was judged: repaired and ingested again, it is another. Empty: the day's logs
    could not be ingested at all."""
    reasons: tuple[str, ...]
    run_key: str = ""
    logs: tuple[str, ...] = ()
    """Of a day that could not be ingested: digests of how its logs are read, and of the logs."""


def yesterday(config: Config) -> str:
    """The last whole day in the logs' time zone."""
    zone = ZoneInfo(config.source.timezone)
    return (datetime.now(zone).date() - timedelta(days=1)).isoformat()


def parse_day(text: str, what: str) -> str:
    """A date like 2026-01-31.

    Raises:
        ConfigError: it is none.
    """
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise ConfigError(f"{what} {text!r} is not a date; write it like 2026-01-31") from None


def days_between(first: str, last: str) -> list[str]:
    """Every date from ``first`` to ``last``."""
    start, stop = date.fromisoformat(first), date.fromisoformat(last)
    return [(start + timedelta(days=n)).isoformat() for n in range((stop - start).days + 1)]


def closed(config: Config, as_of: str) -> dict[str, list[str]]:
    """Day -> raw files of the days up to ``as_of`` whose logs are complete, oldest first."""
    try:
        files = features.day_files(config)
    except NoLogsError:
        return {}
    earliest = (date.fromisoformat(as_of) - timedelta(days=config.recurring.max_days - 1)).isoformat()
    return {day: paths for day, paths in files.items() if earliest <= day <= as_of and _ready(config, day)}


def _ready(config: Config, day: str) -> bool:
    return not config.source.ready or storage.exists(config.source.ready.replace("{day}", day))


def pinned(config: Config, as_of: str, parts: Mapping[str, PartManifest]) -> Run | None:
    """The run that this day, config and data were pinned to, if they were."""
    uri = _pin_uri(config, as_of, parts)
    if not storage.exists(uri):
        return None
    return reopen(config, under_root(config, storage.read_json(uri)["inputs"]))


def pin_day(config: Config, as_of: str, parts: Mapping[str, PartManifest]) -> Run:
    """The run of a day, pinned now or before.

    Raises:
        UserError: the champion is of a later day or of whole logs, the day is in quarantine, or nothing is new.
    """
    known = pinned(config, as_of, parts)
    if known is not None and known.day is not None:
        standing = registry.standing(known)
        if standing.version or standing.champion == known.day.champion:
            return known
        # Another champion stands now, put there by a person: what was pinned could not be registered any more.
    run = _pin(config, as_of, parts)
    inputs = relative_to_root(config, run.reference("inputs.json"))
    storage.write_json(_pin_uri(config, as_of, parts), {"inputs": inputs})
    return run


def _pin(config: Config, as_of: str, parts: Mapping[str, PartManifest]) -> Run:
    root = config.features_root
    parent = registry.parent(config)
    _refuse(config, as_of, parent)
    held = quarantined(config, parts)
    if as_of in held:
        raise UserError(
            f"{as_of} is in quarantine: {'; '.join(held[as_of].reasons)}; repair it, or: des day accept {as_of}"
        )
    checkpoint, known = _start(config, parent)
    cut = windows.cut_of(root, as_of, parts[as_of].part, config.eval.tail, parent.trained_through if parent else 0)
    warm = parent if checkpoint else None
    days = _window(as_of, parts, warm, held)
    trained = {warm.as_of: warm.trained_through} if warm else {}
    window = {day: parts[day] for day in days}
    dataset = windows.write_window(config, root, window, as_of, cut, trained, known)
    began = min([*days, *([warm.as_of, *warm.left_out] if warm else [])])
    through = {day for day in days_between(began, as_of) if warm is None or day > warm.as_of or day in warm.left_out}
    earliest = (date.fromisoformat(as_of) - timedelta(days=config.recurring.max_days - 1)).isoformat()
    kept = {field.name for field in Dataset.load(dataset).fields} & {field.name for field in known}
    day = Day(
        as_of=as_of,
        days={day: _digest(root, day) for day in days},
        left_out=tuple(day for day in sorted(through - set(days)) if day >= earliest),
        cut=cut.time,
        champion=parent.version if parent else "",
        checkpoint=checkpoint,
        kept=tuple(sorted(kept)),
        trained_through=parent.trained_through if parent else 0,
        accepted=accepted(config, days),
    )
    return pin(config, dataset, day)


def _refuse(config: Config, as_of: str, parent: registry.Parent | None) -> None:
    if parent is None:
        return
    name, version = config.run.name, parent.version
    if not parent.as_of:
        raise UserError(
            f"{name}: version {version} was trained over whole logs and may have seen any day; "
            f"give the daily runs a name of their own: --set run.name={name}-daily"
        )
    if parent.as_of > as_of:
        raise UserError(
            f"{name}: champion version {version} is trained through {parent.as_of}, later than {as_of}; "
            "to train on the past, move the alias champion back to a version of an earlier day first"
        )


def _window(
    as_of: str, parts: Mapping[str, PartManifest], warm: registry.Parent | None, held: Mapping[str, Quarantine]
) -> list[str]:
    """Days with rows for this run: all where it starts from nothing, else what the champion has not trained on."""
    days = [day for day in parts if day not in held]
    if warm is None:
        return sorted(days)
    return sorted(day for day in days if day >= warm.as_of or day in warm.left_out or day == as_of)


def _start(config: Config, parent: registry.Parent | None) -> tuple[str, tuple[FieldSpec, ...]]:
    """Reference of the checkpoint to go on from, and the fields that mean the same to it; nothing if none fits."""
    if parent is None or not parent.checkpoint:
        return "", ()
    reference = under_root(config, parent.checkpoint)
    if not storage.exists(reference.uri):
        raise UserError(
            f"{reference.uri}, from which version {parent.version} goes on, is gone; bring it back, "
            f"or begin anew under another name: --set run.name={config.run.name}-2"
        )
    shape = reference.read()["shape"]
    if any(json.loads(json.dumps(form)) != shape[key] for key, form in config.weights_form.items()):
        return "", ()
    key = parent.checkpoint.split("/")[1]
    inputs = storage.read_json(storage.join(config.storage.root, "runs", key, "inputs.json"))
    theirs = Dataset.load(under_root(config, inputs["dataset"])).fields
    ours = {field.name: field for field in features.specs_of(features.fields_of(config))}
    alike = {field.name for field in theirs if field.name in ours and _meaning(field) == _meaning(ours[field.name])}
    # A cross means what its parts mean.
    same = tuple(field for field in theirs if field.name in alike and alike.issuperset(field.cross))
    return (parent.checkpoint, same) if same else ("", ())


def _meaning(field: FieldSpec) -> FieldSpec:
    """A field without what it takes from the data."""
    return field.model_copy(update={name: FieldSpec.model_fields[name].default for name in LEARNED})


def _pin_uri(config: Config, as_of: str, parts: Mapping[str, PartManifest]) -> str:
    """Address of a day's pin, by everything that decides it except the champion."""
    root = config.features_root
    days = {day: [_digest(root, day), storage.exists(_day_uri(config, day, "accepted.json"))] for day in sorted(parts)}
    text = json.dumps([config.run.name, as_of, config.digest, days])
    return _day_uri(config, as_of, f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.json")


def _day_uri(config: Config, day: str, name: str) -> str:
    return storage.join(config.storage.root, "days", day, name)


def _held(config: Config, day: str) -> Quarantine | None:
    """A day's ``quarantine.json``, None where there is none."""
    uri = _day_uri(config, day, "quarantine.json")
    return Quarantine.read(uri) if storage.exists(uri) else None


def _digest(root: str, day: str) -> str:
    return hashlib.sha256(storage.read_bytes(manifest_uri(root, day))).hexdigest()


def quarantine(run: Run, days: Sequence[str], reasons: tuple[str, ...]) -> None:
    """Leave days of the run's window out of later ones, until a person accepts them or their logs are repaired.

    Days that this very run had put there, by other bounds, come out.
    """
    for day, digest in run.day.days.items() if run.day else ():
        uri = _day_uri(run.config, day, "quarantine.json")
        if day in days:
            Quarantine(day=day, manifest=digest, reasons=reasons, run_key=run.key).write(uri)
        elif (held := _held(run.config, day)) is not None and held.run_key == run.key:
            storage.delete(uri)


def ingest(config: Config, files: Mapping[str, Sequence[str]], as_of: str) -> dict[str, PartManifest]:
    """The parts of days; a day whose logs are unusable is put into quarantine and left out.

    Raises:
        DataError: it is the day of this run.
    """

    def put_aside(day: str, error: DataError) -> None:
        record = Quarantine(day=day, manifest="", reasons=(str(error),), logs=_logs(config, files[day]))
        record.write(_day_uri(config, day, "quarantine.json"))
        if day == as_of:
            raise DataError(f"{day} is in quarantine until its logs are repaired: {error}")
        log.emit("quarantine", day=day, why=str(error))

    parts = features.ingest_days(config, files, put_aside)
    for day in parts:
        held = _held(config, day)
        if held is not None and not held.manifest:
            storage.delete(_day_uri(config, day, "quarantine.json"))
    return parts


def unusable(config: Config, day: str, files: Sequence[str]) -> bool:
    """Whether a day is in quarantine because these very logs could not be ingested."""
    held = _held(config, day)
    return held is not None and not held.manifest and held.logs == _logs(config, files)


def _logs(config: Config, files: Sequence[str]) -> tuple[str, ...]:
    return (config.features_digest, *Digests(config.storage.root).of(files))


def accepted(config: Config, days: Iterable[str]) -> tuple[str, ...]:
    """Those of ``days`` that a person took out of quarantine."""
    return tuple(sorted(day for day in days if storage.exists(_day_uri(config, day, "accepted.json"))))


def quarantined(config: Config, days: Mapping[str, object]) -> dict[str, Quarantine]:
    """Those of ``days`` that windows leave out."""
    root = config.features_root
    found: dict[str, Quarantine] = {}
    for day in days:
        held = _held(config, day)
        if held is not None and not storage.exists(_day_uri(config, day, "accepted.json")):
            judged = storage.exists(manifest_uri(root, day)) and held.manifest == _digest(root, day)
            if judged or not held.manifest:
                found[day] = held
    return found


def accept(config: Config, day: str) -> Quarantine:
    """Take a day out of quarantine.

    Raises:
        UserError: it is in none, or its logs could not be read.
    """
    held = quarantined(config, {day: None}).get(day)
    if held is None:
        inside = ", ".join(held_days(config)) or "none"
        raise UserError(f"{day} is not in quarantine; days in quarantine: {inside}")
    if not held.manifest:
        raise UserError(f"{day} cannot be accepted, there are no rows of it: {held.reasons[0]}; repair its logs")
    storage.write_json(_day_uri(config, day, "accepted.json"), {"day": day, "manifest": held.manifest})
    return held


def held_days(config: Config) -> dict[str, Quarantine]:
    """Every day in quarantine."""
    return quarantined(config, dict.fromkeys(storage.list_folder(storage.join(config.storage.root, "days"))))

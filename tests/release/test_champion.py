"""Laws of the champion's scores: which rows, whose definitions, and nothing that it has seen."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks import handmade
from des_core import metrics, storage
from des_core.config import Config, parse_config
from des_core.contracts import Dataset, FieldSpec, Segment
from des_core.data.feed.batches import field_values, ids_of
from des_core.data.store import features, windows
from des_core.data.store.encoding import fields_of, specs_of
from des_core.engine.models import build
from des_core.errors import ConfigError, RegistryError
from des_core.release.judge import champion
from des_core.release.judge.gate import decide
from des_core.release.registry import registry
from des_core.run import Day, Run, pin
from des_core.verdict import Champion, NewRows, Verdict

DAYS = ("2026-01-01", "2026-01-02", "2026-01-03")
ROWS = 400
FIELDS: list[dict[str, Any]] = [
    {"name": "user"},
    {"name": "tags", "kind": "multi"},
    {"name": "price", "kind": "numeric", "transform": "standard"},
]


def config_of(root: Path, fields: list[dict[str, Any]] = FIELDS, **gate: Any) -> Config:
    return parse_config(
        {
            "run": {"name": "shop", "dir": str(root)},
            "source": {"path": str(root / "logs/{day}.csv"), "time": "time", "label": "click"},
            "fields": fields,
            "model": {"name": "fm", "factors": 4},
            "storage": {"root": str(root / "store")},
            "registry": {"tracking_uri": f"sqlite:///{root}/mlflow.db"},
            "gate": gate,
        }
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    random = np.random.default_rng(0)
    for number, day in enumerate(DAYS):
        lines = ["click,time,user,tags,price,new"]
        for row in range(ROWS):
            moment = 1767225600 + number * 86_400 + row * 200
            tags = "|".join(f"t{tag}" for tag in random.integers(0, 9, random.integers(0, 3)))
            user, price = random.integers(0, 60), random.normal(10 * number, 3)
            lines.append(f"{random.integers(0, 2)},{moment},u{user},{tags},{price:.3f},x{row % 5}")
        (tmp_path / "logs" / f"{day}.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def run_of(config: Config, as_of: str, champion: str = "", trained: dict[str, int] | None = None, **more: Any) -> Run:
    """A day's run over the days whose ``trained`` times are given, and the day itself."""
    parts = features.ingest_days(config, features.day_files(config))
    root = config.features_root
    cut = windows.cut_of(root, as_of, parts[as_of].part, 0.1)
    trained = trained or {}
    window = {day: part for day, part in parts.items() if day == as_of or day in trained}
    dataset = windows.write_window(
        config, root, window, as_of, cut, {day: time for day, time in trained.items() if time}
    )
    days = dict.fromkeys(window, "0" * 64)
    more = {"checkpoint": "checkpoints/x#sha256:" + "0" * 64 if champion else ""} | more
    return pin(config, dataset, Day(as_of=as_of, days=days, cut=cut.time, champion=champion, **more))


def export(folder: Path, run: Run, fields: tuple[FieldSpec, ...] | None = None, seed: int = 3) -> None:
    """A model of random rows for all values of a run's store, as a registered one is."""
    dataset = Dataset.load(run.dataset)
    fields = fields or dataset.fields
    root = run.dataset.uri.rpartition("/")[0]
    known = {field.name for field in dataset.fields}
    parts = [pq.read_table(storage.join(root, part.path)) for part in dataset.parts.values()]
    keys: dict[str, list[np.ndarray]] = {field.table: [] for field in fields}
    for field in fields:
        if field.name in known:
            keys[field.table] += [ids_of(field_values(part, field)[0], field.table) for part in parts]
    ids = {table: np.unique(np.concatenate(found)) for table, found in keys.items() if found}
    model = build(run.config.model, [field.name for field in fields], 0, seed)
    random = np.random.default_rng(seed)
    rows = {table: random.normal(0, 0.3, (len(ids[table]), model.row_width)).astype(np.float32) for table in ids}
    checkpoint = handmade.checkpoint(str(folder), "by-hand", 1, fields, ids, rows, model)
    handmade.describe(str(folder), run.key, run.config, fields, checkpoint)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Version -> folder of its model, in the place of the registry; others are looked up in the real one."""
    folders: dict[str, Path] = {}
    real: Callable[..., registry.StoredModel] = registry.fetch

    def fetch(model_uri: str, tracking_uri: str, into: str) -> registry.StoredModel:
        version = model_uri.rpartition("/")[2]
        if version not in folders:
            return real(model_uri, tracking_uri, into)
        return registry.StoredModel("shop", version, str(folders[version]))

    monkeypatch.setattr(registry, "fetch", fetch)
    monkeypatch.setattr(registry, "chain", lambda uri, tracking: [])
    return folders


def evaluated(run: Run) -> Run:
    """The run with predictions of its test rows."""
    table = champion._samples(run.dataset, ("test",)).drop_columns(["time", "day"])
    scores = np.random.default_rng(1).random(table.num_rows)
    digest = champion._write(run.path("predictions.parquet"), table.append_column("probability", [scores]))
    storage.write_json(run.path("report.json"), {"predictions_sha256": digest})
    return run


def samples(run: Run, *splits: str) -> list[str]:
    return champion._samples(run.dataset, splits)["sample"].to_pylist()


def test_new_rows_are_the_windows_and_none_that_the_champion_was_trained_on(
    root: Path, registered: dict[str, Path]
) -> None:
    config = config_of(root)
    first = run_of(config, DAYS[0])
    export(root / "one", first)
    registered["1"] = root / "one"
    assert first.day is not None
    run = run_of(config, DAYS[1], "1", {DAYS[0]: first.day.cut})
    reference, kept = champion.score_new(run)
    record = NewRows.load(reference)
    table = pq.read_table(run.path("new_rows.parquet"))
    assert not kept and champion.score_new(run) == (reference, True)
    assert table.column_names == ["sample", "label", "day", "probability"]
    assert table["sample"].to_pylist() == samples(run, "train", "test")
    assert not set(table["sample"].to_pylist()) & set(samples(first, "train")), "seen"
    assert set(samples(first, "test")) < set(table["sample"].to_pylist()), "the champion's own tail is new to it"
    assert (record.as_of, record.version, record.samples) == (DAYS[1], "1", table.num_rows)
    assert {day: each["samples"] for day, each in record.days.items()} == {DAYS[0]: ROWS * 0.1, DAYS[1]: ROWS}
    labels, scores = table["label"].to_numpy(), table["probability"].to_numpy()
    assert record.metrics["auc"] == metrics.auc(labels, scores)
    later = table["day"].to_numpy(zero_copy_only=False) == DAYS[1]
    assert record.days[DAYS[1]]["logloss"] == pytest.approx(metrics.logloss(labels[later], scores[later]))
    assert sorted(record.drift) == ["price", "tags", "user"]
    assert record.drift["price"]["psi"] > 1, "prices moved by a day"


def test_without_weights_to_go_on_from_only_rows_that_the_champion_has_not_seen_count(
    root: Path, registered: dict[str, Path]
) -> None:
    config = config_of(root)
    first = run_of(config, DAYS[1], trained={DAYS[0]: 0})
    export(root / "one", first)
    registered["1"] = root / "one"
    run = run_of(config, DAYS[2], "1", dict.fromkeys(DAYS[:2], 0), checkpoint="")
    assert set(samples(first, "train")) < set(samples(run, "train")), "trained from nothing, on all days"
    champion.score_new(run)
    scored = pq.read_table(run.path("new_rows.parquet"))["sample"].to_pylist()
    assert sorted(scored) == sorted(set(samples(run, "train", "test")) - set(samples(first, "train")))


def test_without_a_champion_there_is_drift_only(root: Path) -> None:
    run = run_of(config_of(root), DAYS[1], trained={DAYS[0]: 0})
    record = NewRows.load(champion.score_new(run)[0])
    assert (record.version, record.samples, record.metrics, record.days) == ("", 0, {}, {})
    assert set(record.drift) == {"price", "tags", "user"}
    assert not storage.exists(run.path("new_rows.parquet"))
    assert NewRows.load(champion.score_new(run_of(config_of(root), DAYS[0]))[0]).drift == {}
    assert Champion.load(champion.score(evaluated(run))[0]).status == "none"


def test_the_test_rows_scores_are_those_of_the_new_rows(root: Path, registered: dict[str, Path]) -> None:
    config = config_of(root)
    export(root / "one", run_of(config, DAYS[0]))
    registered["1"] = root / "one"
    run = evaluated(run_of(config, DAYS[1], "1"))
    champion.score_new(run)
    del registered["1"]
    reference, kept = champion.score(run)
    record = Champion.load(reference)
    assert (record.status, record.version, kept) == ("scored", "1", False)
    scored, new = (pq.read_table(run.path(name)) for name in ("champion.parquet", "new_rows.parquet"))
    assert scored["sample"].to_pylist() == samples(run, "test")
    assert scored["probability"].to_pylist() == new["probability"].to_pylist()[-len(scored) :]
    assert champion.score(run) == (reference, True)


def test_scores_before_and_after_training_are_the_same(root: Path, registered: dict[str, Path]) -> None:
    config = config_of(root)
    export(root / "one", run_of(config, DAYS[0]))
    registered["1"] = root / "one"
    run = evaluated(run_of(config, DAYS[1], "1"))
    champion.score(run)
    alone = pq.read_table(run.path("champion.parquet"))
    storage.delete(run.path("champion.json"))
    champion.score_new(run)
    champion.score(run)
    np.testing.assert_allclose(
        pq.read_table(run.path("champion.parquet"))["probability"], alone["probability"], rtol=0, atol=1e-7
    )


def test_numbers_mean_what_they_meant_to_the_champion(root: Path, registered: dict[str, Path]) -> None:
    config = config_of(root)
    first = run_of(config, DAYS[0])
    export(root / "one", first)
    export(root / "two", first, Dataset.load(run_of(config, DAYS[2]).dataset).fields)
    registered.update({"1": root / "one", "2": root / "two"})
    found = {}
    for version in registered:
        run = evaluated(run_of(config, DAYS[1], version))
        champion.score(run)
        found[version] = pq.read_table(run.path("champion.parquet"))["probability"].to_numpy()
    assert np.abs(found["1"] - found["2"]).min() > 0, "the same weights, another mean of prices"
    # Against a store whose own statistics are the champion's.
    fields = Dataset.load(first.dataset).fields
    same = Dataset.load(run.dataset).model_copy(update={"fields": fields})
    reference = same.write(run.dataset.uri.replace("window-", "window-x"))
    from des_core.release.serve.serving import Scorer

    expected = Scorer(str(root / "one")).score_dataset(reference, "test")[2]
    np.testing.assert_allclose(found["1"], expected, rtol=0, atol=1e-7)


def test_other_definitions_are_ingested_again_apart_and_joined(root: Path, registered: dict[str, Path]) -> None:
    theirs = config_of(root, [{"name": "user"}, {"name": "tags"}, {"name": "price", "kind": "numeric"}])
    old = run_of(
        theirs.model_copy(update={"storage": theirs.storage.model_copy(update={"root": str(root / "old")})}), DAYS[0]
    )
    export(root / "one", old)
    registered["1"] = root / "one"
    run = evaluated(run_of(config_of(root), DAYS[1], "1"))
    record = NewRows.load(champion.score_new(run)[0])
    assert record.version == "1"
    table = pq.read_table(run.path("new_rows.parquet"))
    assert table["sample"].to_pylist() == samples(run, "train", "test")
    from des_core.release.serve.serving import Scorer

    day = run_of(old.config, DAYS[1])
    whole = Dataset.load(day.dataset)
    everything = {"train": (Segment(part=DAYS[1], start=0, stop=ROWS),), "valid": (), "test": ()}
    reference = whole.model_copy(update={"splits": everything}).write(day.dataset.uri.replace("window-", "window-x"))
    names, _, scores = Scorer(str(root / "one")).score_dataset(reference, "train")
    expected = dict(zip(names, scores, strict=True))
    for row in table.to_pylist():
        assert row["probability"] == pytest.approx(expected[row["sample"]], abs=1e-6)
    assert not storage.exists(champion._scratch(run)), "the scratch store is gone"
    other = run_of(config_of(root), DAYS[2], "1")
    assert champion._scratch(run) != champion._scratch(other)


def test_a_champion_whose_column_is_gone_stays_unless_bounds_may_decide(
    root: Path, registered: dict[str, Path]
) -> None:
    verdicts = {}
    for setting in ("keep", "absolute"):
        config = config_of(root, on_schema_change=setting, min_auc=0, max_ne=100, min_samples=10, max_psi=100)
        if not registered:
            fields = (
                *specs_of(fields_of(config)),
                FieldSpec(name="gone", column="gone", table="gone", kind="categorical"),
            )
            export(root / "one", run_of(config, DAYS[0]), fields)
            registered["1"] = root / "one"
        run = evaluated(run_of(config, DAYS[1], "1"))
        record = NewRows.load(champion.score_new(run)[0])
        assert record.version == "" and "'gone'" in record.reason and record.drift
        found = Champion.load(champion.score(run)[0])
        assert (found.status, found.version) == ("not_comparable", "1") and "'gone'" in found.reason
        verdicts[setting] = Verdict.load(decide(run))
        assert not storage.exists(champion._scratch(run))
    assert (verdicts["keep"].verdict, verdicts["absolute"].verdict) == ("not_comparable", "accept")
    assert "on_schema_change" in verdicts["absolute"].reasons[-1]


def test_a_reference_is_compared_too(root: Path, registered: dict[str, Path]) -> None:
    config = config_of(root, reference="1", min_samples=10, max_psi=100)
    first = run_of(config, DAYS[0])
    export(root / "one", first)
    export(root / "two", first, seed=4)
    registered.update({"1": root / "one", "2": root / "two"})
    run = evaluated(run_of(config, DAYS[1], "2"))
    champion.score_new(run)
    assert Champion.load(champion.score(run)[0]).reference == "1"
    theirs, others = (pq.read_table(run.path(name)) for name in ("champion.parquet", "reference.parquet"))
    assert theirs["sample"] == others["sample"] and theirs["probability"] != others["probability"]
    verdict = Verdict.load(decide(run))
    assert (verdict.champion, verdict.reference) == ("2", "1")
    assert verdict.metrics["reference_auc"] != verdict.metrics["champion_auc"]


def test_a_reference_that_is_not_there_or_saw_the_rows_is_one_line(root: Path, registered: dict[str, Path]) -> None:
    config = config_of(root, reference="7")
    run = evaluated(run_of(config, DAYS[1]))
    with pytest.raises(RegistryError, match=r"models:/shop/7"):
        champion.score(run)
    export(root / "later", run_of(config, DAYS[2]))
    registered["7"] = root / "later"
    with pytest.raises(ConfigError, match=rf"gate\.reference = 7 was trained as of {DAYS[2]} and may have seen rows"):
        champion.score(run)
    export(root / "whole", pin(config, run.dataset))
    registered["7"] = root / "whole"
    with pytest.raises(ConfigError, match=r"gate\.reference = 7: no day's run in storage.root trained it"):
        champion.score(run)


def test_a_day_is_compared_with_the_champion_of_a_week_before(
    root: Path, registered: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drops that are within the bound each day add up; a version of long ago shows them."""

    def chain(*days: str) -> None:
        links = [SimpleNamespace(version=str(3 - number), as_of=day) for number, day in enumerate(days)]
        monkeypatch.setattr(registry, "chain", lambda uri, tracking: links)

    config = config_of(root, min_samples=10, max_psi=100)
    first = run_of(config, DAYS[0])
    export(root / "one", first)
    export(root / "three", first, seed=4)
    registered.update({"1": root / "one", "3": root / "three"})
    run = evaluated(run_of(config, DAYS[1], "3"))
    champion.score_new(run)
    before = (date.fromisoformat(DAYS[1]) - timedelta(days=7)).isoformat()
    chain(DAYS[0], DAYS[0], before)
    found = Champion.load(champion.score(run)[0])
    assert (found.version, found.reference, found.reference_given) == ("3", "1", False)
    assert champion.score(run)[1], "kept"
    assert pq.read_table(run.path("reference.parquet")).num_rows == pq.read_table(run.path("champion.parquet")).num_rows
    verdict = Verdict.load(decide(run))
    assert verdict.reference == "1" and "reference_auc" in verdict.metrics
    chain(before)
    assert Champion.load(champion.score(run)[0]).reference == "", "the champion itself is of a week before"
    chain(DAYS[0])
    assert Champion.load(champion.score(run)[0]).reference == "", "nobody is"
    chain(DAYS[0], before)
    for setting, wanted in (("none", ""), ("1", "1")):
        other = run_of(config_of(root, reference=setting), DAYS[1], "3")
        assert champion._reference(other) == (wanted, True)
    # One that cannot score the rows is told, and the verdict is made without it.
    registered["1"] = root / "gone"
    chain(DAYS[0], DAYS[0], before)
    record = Champion.load(champion.score(run)[0])
    assert record.reference == "1" and "gone" in record.reference_reason
    verdict = Verdict.load(decide(run))
    assert verdict.verdict in ("accept", "reject") and "reference_auc" not in verdict.metrics

"""Stages: what is checked before work, what is skipped when it is done, what is no longer trusted."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from components import finished, stages, step_runtime
from des_core import storage
from des_core.config import Config
from des_core.contracts import Dataset
from des_core.data.store import features
from des_core.errors import ConfigError, DataError, RegistryError, UserError
from des_core.recurring import daily
from des_core.verdict import Champion
from tests.finished import config_of, finished_run


def test_a_run_is_resolved_to_a_day_or_to_all(tmp_path: Path) -> None:
    done = stages.resolve(config_of(tmp_path))
    assert (done.reference, done.what) == ("all", "fm on 2 workers, 1 file of csv logs")
    with pytest.raises(DataError, match=r"a day's run needs \{day\} in source\.path"):
        stages.resolve(config_of(tmp_path), "2026-01-31")
    daily = ("source.path=" + str(tmp_path / "{day}.csv"), "source.time=when")
    yesterday = (datetime.now(UTC).date() - timedelta(days=1)).isoformat()
    assert stages.resolve(config_of(tmp_path, *daily), yesterday).reference == "absent"
    (tmp_path / f"{yesterday}.csv").write_text("when,click,user\n")
    for as_of in (yesterday, "yesterday"):
        assert stages.resolve(config_of(tmp_path, *daily), as_of).reference == yesterday
    with pytest.raises(ConfigError, match="'today' is not a date"):
        stages.resolve(config_of(tmp_path, *daily), "today")


@pytest.mark.parametrize("as_of", ["[[ScheduledTime]]", "{{workflow.creationTimestamp}}"])
def test_a_time_that_nobody_expanded_is_refused(tmp_path: Path, as_of: str) -> None:
    with pytest.raises(ConfigError, match="was not expanded"):
        stages.resolve(config_of(tmp_path), as_of)


def test_missing_logs_and_registries_that_cannot_be_are_told_first(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv: no such file"):
        stages.resolve(config_of(tmp_path, f"source.path={tmp_path}/none.csv"))
    with pytest.raises(RegistryError, match="write it as sqlite:///"):
        stages.resolve(config_of(tmp_path, "registry.tracking_uri=mlruns"))


def many_logs(folder: Path, *overrides: str) -> Config:
    config = config_of(folder, *overrides)
    rows = [f"{row % 2},u{row % 7},a|t{row % 3},{row}" for row in range(200)]
    (folder / "logs.csv").write_text("\n".join(["click,user,tags,price", *rows]) + "\n")
    return config


def test_ingestion_says_what_it_found_and_when_nothing_changed(tmp_path: Path) -> None:
    config = many_logs(tmp_path)
    first = stages.ingest(config)
    assert first.what == "160 train, 20 valid, 20 test rows, 3 fields"
    assert not first.unchanged
    again = stages.ingest(config)
    assert (again.unchanged, again.reference) == (True, first.reference)


def test_bad_rows_are_told(tmp_path: Path) -> None:
    config = many_logs(tmp_path, "source.max_bad_share=0.1")
    with open(tmp_path / "logs.csv", "a") as file:
        file.write("7,u1,a,1\n")
    assert stages.ingest(config).what.endswith("; 1 bad row in quarantine")


def test_only_the_very_same_logs_and_config_count_as_ingested(tmp_path: Path) -> None:
    config = many_logs(tmp_path)
    assert not finished.is_ingested(config)
    features.ingest(config)
    assert finished.is_ingested(config)
    assert not finished.is_ingested(many_logs(tmp_path, "fields=[{name='user'}]"))
    with open(tmp_path / "logs.csv", "a") as file:
        file.write("1,u1,a,1\n")
    assert not finished.is_ingested(config)
    (tmp_path / "logs.csv").unlink()
    with pytest.raises(DataError, match="no such file"):
        finished.is_ingested(config)


def test_a_trained_run_is_not_trained_again(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    done = stages.train(run)
    assert done.unchanged
    assert done.what == "2 workers, 96 steps, 41,250 samples/s"
    assert done.reference == str(run.reference("training.json"))


def test_training_whose_checkpoint_is_gone_is_no_training(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    storage.delete(run.checkpoints)
    with pytest.raises(UserError, match="run des train first"):
        stages.evaluate(run)


def test_an_evaluated_run_is_only_compared_and_shown(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    done = stages.evaluate(run)
    assert not done.unchanged, "the comparison is new"
    assert Champion.load(run.reference("champion.json")).status == "none"
    assert done.numbers["auc"] == storage.read_json(run.path("report.json"))["auc"]
    assert (Path(run.config.run.dir) / "report.html").exists()
    again = stages.evaluate(run)
    assert (again.unchanged, again.reference) == (True, done.reference)


def test_the_gate_is_told_with_its_first_reason_and_the_verdict_has_all(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    with pytest.raises(UserError, match="run des evaluate first"):
        stages.gate(run)
    stages.evaluate(run)
    done = stages.gate(run)
    assert done.what.startswith("accept: AUC 0.")
    assert "no champion" not in done.what and len(done.what) < 90
    assert done.numbers["reasons"][1:] == ["there is no champion to compare with"]
    assert stages.gate(run).unchanged


def test_a_run_that_is_not_registered_is_not_settled(tmp_path: Path) -> None:
    config = many_logs(tmp_path)
    assert finished.finished_run(config) is None
    features.ingest(config)
    assert finished.finished_run(config) is None
    assert Dataset.load(features.ingest(config)).rows("train") == 160


def test_example_records_are_of_the_runs_own_day(tmp_path: Path) -> None:
    """The oldest logs may lack a column that the model reads."""
    for day, names in enumerate(("click,user,tags,when", "click,user,tags,price,when"), 1):
        rows = [f"{n % 2},0{n},a,{'' if day == 1 else '1.5,'}2026-01-0{day}T00:00:0{n}" for n in range(9)]
        (tmp_path / f"2026-01-0{day}.csv").write_text("\n".join([names, *rows]) + "\n")
    config = config_of(tmp_path, f"source.path={tmp_path}/{{day}}.csv", "source.time=when", "recurring.max_days=1")
    run = stages.ingest_and_pin(config, "2026-01-02").numbers.get("run") or daily.pin_day(
        config, "2026-01-02", stages.day_parts(config, "2026-01-02")
    )
    rows = stages.example_rows(run)
    assert rows.column_names == ["user", "tags", "price"] and rows.num_rows == stages.EXAMPLE_ROWS
    assert rows.column("price").to_pylist() == ["1.5"] * 5


def test_two_names_share_a_folder_and_keep_their_features(tmp_path: Path) -> None:
    first = many_logs(tmp_path)
    reference = stages.ingest(first).reference
    (tmp_path / "other.csv").write_text((tmp_path / "logs.csv").read_text().replace(",u1,", ",v1,"))
    second = many_logs(tmp_path, "run.name=other", f"source.path={tmp_path}/other.csv")
    assert second.storage.root == first.storage.root
    assert stages.ingest(second).reference != reference
    assert finished.is_ingested(first) and finished.is_ingested(second)
    assert stages.ingest(first).unchanged


def test_days_are_not_counted_over_whole_logs_in_random_order(tmp_path: Path) -> None:
    words = ("source.time=price", "table.idle_days=3")
    with pytest.raises(ConfigError, match=r"table.idle_days counts the days .* set train.shuffle to false, or run day"):
        stages.resolve(config_of(tmp_path, *words))
    assert stages.resolve(config_of(tmp_path, *words, "train.shuffle=false")).reference == "all"


def test_what_killed_runs_of_a_name_noted_goes_with_the_next(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    for holder in ("1:dead", "2:mine"):
        storage.write_json(step_runtime.status_uri(config, holder), {"done": {}})
    other = config.model_copy(update={"run": config.run.model_copy(update={"name": "shop-2"})})
    storage.write_json(step_runtime.status_uri(other, "3:other"), {"done": {}})
    step_runtime.sweep_status(config, "2:mine")
    left = storage.list_folder(storage.join(config.storage.root, "status"))
    assert left == ["shop-2.3-other.json", "shop.2-mine.json"]

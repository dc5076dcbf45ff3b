"""A week, day by day, by ``make week``: one day's labels are shuffled, one day's logs come late, a webhook listens.

The week is played once; every law is read from what it left behind. A day is then played once more in another place,
killed after each of its steps.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest

from components import stages
from des_core import storage
from des_core.config import Config, load_config
from des_core.contracts import FILE, ROW, TIME, Dataset, Reference
from des_core.data.feed.batches import Stream
from des_core.errors import BusyError, DataError, UserError
from des_core.recurring import daily, lease
from des_core.release.registry import mlflow_client
from des_core.run import Day, Run, reopen, under_root
from tests.pipelines.test_local import DES, ROOT, Ended, des, start

TOML = """
[run]
name = "week"
[source]
path = "logs/{day}.csv"
ready = "logs/{day}.ready"
time = "time"
group = "user"
[[fields]]
name = "user"
[[fields]]
name = "item"
[[fields]]
name = "category"
[[fields]]
name = "site"
[[fields]]
name = "slot"
[[fields]]
name = "region"
[[fields]]
name = "price"
kind = "numeric"
transform = "standard"
[model]
name = "fm"
factors = 4
[train]
batch = 256
[optimizer.rows]
learning_rate = 0.05
[recurring]
epochs = 2
[gate]
min_auc = 0.6
max_auc_drop = 0.1
"""

DAYS = [f"2026-01-{number:02d}" for number in range(1, 9)]
SHUFFLED, LATE = DAYS[3], DAYS[5]
STEPS = ("resolve", "ingest", "score", "train", "evaluate", "gate", "register")


class Week(NamedTuple):
    """What the week left."""

    folder: Path
    config: Config
    ended: Ended
    told: list[dict[str, Any]]
    """What the webhook got."""

    def day(self, day: str) -> Run:
        """The run of a day."""
        key = next(result["run_key"] for result in self.ended.answer["days"] if result["as_of"] == day)
        uri = storage.join(self.config.storage.root, "runs", key[:12], "inputs.json")
        return reopen(self.config, Reference(uri, hashlib.sha256(storage.read_bytes(uri)).hexdigest()))


@pytest.fixture(scope="module")
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An address, and all that was posted to it."""
    told: list[dict[str, Any]] = []

    class Listener(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Listener) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/", told
        server.shutdown()


def make_logs(folder: Path) -> None:
    """Eight days of logs; one day's labels are shuffled, and one day is not ready."""
    assert des(folder, "generate", "--out", "logs", "--days", "8", "--rows-per-day", "3000").code == 0
    shutil.rmtree(folder / "logs/truth")
    path = folder / f"logs/{SHUFFLED}.csv"
    with path.open(newline="") as file:
        names, *rows = csv.reader(file)
    labels = [row[names.index("label")] for row in rows]
    random.Random(4).shuffle(labels)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([*row[:-1], label] for row, label in zip(rows, labels, strict=True))
    for day in DAYS:
        if day != LATE:
            (folder / f"logs/{day}.ready").touch()
    (folder / "week.toml").write_text(TOML)


@pytest.fixture(scope="module")
def week(tmp_path_factory: pytest.TempPathFactory, webhook: tuple[str, list[dict[str, Any]]]) -> Week:
    """Seven days by ``make week``."""
    folder = tmp_path_factory.mktemp("week")
    make_logs(folder)
    address, told = webhook
    des_program = folder / "bin" / "des"
    des_program.parent.mkdir()
    des_program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{DES[2]}" "$@"\n')
    des_program.chmod(0o755)
    words = ["make", "-s", "-f", str(ROOT / "Makefile"), "-o", "install", "week", f"VENV={folder}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DES_WEBHOOK": address}
    done = subprocess.run(
        [*words, f"CONFIG={folder}/week.toml", "ARGS=--json"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    config = load_config(folder / "week.toml", (f"run.dir={folder}/runs/week", "run.name=week"))
    return Week(folder, config, Ended(done.returncode, lines, done.stderr, json.loads(lines[-1])), list(told))


def test_every_day_ends_as_it_should(week: Week) -> None:
    days = week.ended.answer["days"]
    assert [day["as_of"] for day in days] == DAYS[:7]
    verdicts = {day["as_of"]: day["verdict"] for day in days}
    assert verdicts == dict.fromkeys(DAYS[:7], "accept") | {SHUFFLED: "reject", LATE: "absent"}
    assert [day.get("version") for day in days] == [1, 2, 3, 4, 5, None, 6]
    assert days[4]["auc"] > days[0]["auc"], "it learns"


def test_a_webhook_is_told_of_every_day(week: Week) -> None:
    told = [(notice["as_of"], notice["outcome"], notice.get("version")) for notice in week.told]
    days = week.ended.answer["days"]
    assert [(as_of, outcome) for as_of, outcome, _ in told] == [(day["as_of"], day["verdict"]) for day in days]
    assert [version for *_, version in told] == [None if "version" not in day else str(day["version"]) for day in days]
    assert all(notice["reasons"] for notice in week.told)


def test_windows_follow_the_champion(week: Week) -> None:
    """Each goes on from the last accepted version, at its cut, without the day in quarantine and the absent one."""
    pinned = [(run.day.champion, sorted(run.day.days), run.day.left_out) for run in runs(week) if run.day is not None]
    assert pinned == [
        ("", DAYS[:1], ()),
        ("1", DAYS[:2], ()),
        ("2", DAYS[1:3], ()),
        ("3", DAYS[2:4], ()),
        ("3", [DAYS[2], DAYS[4]], (SHUFFLED,)),
        ("5", [DAYS[4], DAYS[6]], (SHUFFLED, LATE)),
    ]
    cuts = [run.day.cut for run in runs(week) if run.day is not None]
    assert cuts == sorted(cuts)
    for run in runs(week)[1:]:
        assert run.day is not None
        assert run.day.trained_through == cuts[int(run.day.champion) - 1]
        assert run.champion_checkpoint is not None
        assert storage.read_json(run.path("training.json"))["first_step"] > 0


def runs(week: Week) -> list[Run]:
    return [week.day(day["as_of"]) for day in week.ended.answer["days"] if "run_key" in day]


def samples(run: Run, split: str) -> set[tuple[str, int]]:
    """Ids of a split's samples."""
    files = Dataset.load(run.dataset).files
    ids: set[tuple[str, int]] = set()
    for batch in Stream(run.dataset, split, [FILE, ROW]).batches(1 << 16):
        ids |= {(files[file], row) for file, row in zip(batch[FILE].to_pylist(), batch[ROW].to_pylist(), strict=True)}
    return ids


def test_no_sample_is_scored_by_a_model_that_has_seen_it(week: Week) -> None:
    """Neither candidate nor champion has trained on a tail; the champion has trained on none of the new rows."""
    seen: dict[str, set[tuple[str, int]]] = {"": set()}
    trained_once: set[tuple[str, int]] = set()
    for version, run in enumerate(runs(week), 1):
        assert run.day is not None
        parents, tail, new = seen[run.day.champion], samples(run, "test"), samples(run, "train")
        assert not new & tail and not tail & parents and not new & parents
        assert len(tail) == pq.read_table(run.path("predictions")).num_rows == 300
        seen[str(version)] = parents | new
        scored = storage.read_json(run.path("new_rows.json"))
        assert scored["version"] == run.day.champion
        if run.day.champion:
            assert scored["samples"] == len(new) + len(tail)
        trained_once |= new
    every = seen["6"]
    assert len(every) == 5 * 3000 - 300, "all rows of five days, once, but for the last tail"


def test_the_cut_is_a_time(week: Week) -> None:
    for run in runs(week):
        assert run.day is not None
        for split, early in (("train", True), ("test", False)):
            for batch in Stream(run.dataset, split, [TIME]).batches(1 << 16):
                assert all((time < run.day.cut) == early for time in batch[TIME].to_pylist())


def test_versions_say_where_they_stand(week: Week) -> None:
    with mlflow_client.connect(week.config.registry.tracking_uri) as client:
        tags = {number: client.get_model_version("week", str(number)).tags for number in range(1, 7)}
        aliases = client.get_registered_model("week").aliases
    for version, run in enumerate(runs(week), 1):
        assert run.day is not None
        assert tags[version]["des.as_of"] == run.day.as_of
        cut = datetime.fromtimestamp(run.day.cut / 1e6, UTC)
        assert datetime.fromisoformat(tags[version]["des.trained_through"]) == cut
        assert tags[version].get("des.left_out", "") == ",".join(run.day.left_out)
        assert tags[version].get("des.parent_version", "") == run.day.champion
    assert {alias: str(version) for alias, version in aliases.items()} == {"candidate": "6", "champion": "6"}


def versions(uri: str) -> int:
    """How many versions a registry has of this model."""
    with mlflow_client.connect(uri) as client:
        return len(client.search_model_versions("name='week'"))


def test_the_bad_day_is_in_quarantine_for_its_data(week: Week) -> None:
    verdict = storage.read_json(week.day(SHUFFLED).path("gate.json"))
    assert verdict["data_at_fault"] and not verdict["accepted"]
    held = daily.held_days(week.config)
    assert list(held) == [SHUFFLED]
    assert held[SHUFFLED].reasons == tuple(verdict["reasons"])
    listed = des(week.folder, "day", "list", "-c", "week.toml")
    assert list(listed.answer["quarantined"]) == [SHUFFLED]


def test_a_day_again_is_unchanged(week: Week) -> None:
    for day in (DAYS[0], SHUFFLED, DAYS[6]):
        again = des(week.folder, "run", "-c", "week.toml", "--as-of", day)
        assert again.code == 0, again.error
        assert again.answer["unchanged"]
        assert again.answer["run_key"] == week.day(day).key
    assert versions(week.config.registry.tracking_uri) == 6


def tree(root: str | Path) -> dict[str, str]:
    """Every file under a folder, with its sha256."""
    paths = (path for path in Path(root).rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_every_step_again_changes_nothing(week: Week) -> None:
    run = week.day(DAYS[6])
    root = week.config.storage.root
    before = tree(root)
    assert stages.resolve(week.config, DAYS[6]).reference == DAYS[6]
    again = stages.ingest_and_pin(week.config, DAYS[6])
    assert again.unchanged and again.reference == str(run.reference("inputs.json"))
    for step in (stages.score, stages.train, stages.evaluate, stages.gate, stages.register):
        assert step(run).unchanged, step.__name__
    after = tree(root)
    moved = {name for name in before | after if before.get(name) != after.get(name)}
    assert moved <= {"mlflow.db", "latest", "digests.json"}, moved


def test_a_later_day_takes_in_what_was_accepted_and_what_came_late(week: Week, tmp_path: Path) -> None:
    """On a copy of the results: a person lifts the quarantine, the late logs have come, the next day trains on both."""
    shutil.copytree(week.config.storage.root, tmp_path / "runs")
    here = ("-c", "week.toml", "--set", f"run.dir={tmp_path}/runs")
    refused = des(week.folder, "day", "accept", DAYS[4], *here)
    assert refused.code == 2 and f"days in quarantine: {SHUFFLED}" in refused.error
    assert des(week.folder, "day", "accept", SHUFFLED, *here).code == 0
    assert not des(week.folder, "day", "list", *here).answer["quarantined"]
    # The day itself, again: another run, whose judgement knows that a person took it.
    before = week.day(SHUFFLED)
    own = load_config(week.folder / "week.toml", (f"run.dir={tmp_path}/runs",))
    with mlflow_client.connect(own.registry.tracking_uri) as client:
        client.set_registered_model_alias("week", "champion", before.day.champion if before.day else "")
    anew = daily.pin_day(own, SHUFFLED, stages.day_parts(own, SHUFFLED))
    assert anew.day is not None and anew.day.accepted == (SHUFFLED,) and anew.key != before.key
    assert not storage.exists(anew.path("new_rows.json"))
    with mlflow_client.connect(own.registry.tracking_uri) as client:
        client.set_registered_model_alias("week", "champion", "6")
    config = load_config(week.folder / "week.toml", (f"run.dir={tmp_path}/runs",))
    ready = week.folder / f"logs/{LATE}.ready"
    ready.touch()
    try:
        run = daily.pin_day(config, DAYS[7], stages.day_parts(config, DAYS[7]))
    finally:
        ready.unlink()
    assert run.day is not None
    assert (sorted(run.day.days), run.day.left_out) == ([SHUFFLED, LATE, DAYS[6], DAYS[7]], ())
    assert Dataset.load(run.dataset).rows("train") == 2 * 3000 + 300 + 2700


def test_the_past_is_not_trained_on_under_a_newer_champion(week: Week) -> None:
    config = load_config(week.folder / "week.toml", (f"run.dir={week.folder}/runs/week", "run.name=week", "run.seed=7"))
    with pytest.raises(UserError, match=r"champion version 6 is trained through 2026-01-07, later than 2026-01-02"):
        daily.pin_day(config, DAYS[1], stages.day_parts(config, DAYS[1]))


def test_whole_logs_and_days_do_not_mix_under_one_name(week: Week) -> None:
    with pytest.raises(UserError, match="week is retrained by the day"):
        stages.resolve(week.config)


def test_a_day_that_must_come_is_an_error(week: Week) -> None:
    ended = des(week.folder, "run", "-c", "week.toml", "--as-of", LATE, "--set", "recurring.on_missing=fail")
    assert ended.code == 2
    assert f"error: {LATE}: " in ended.error and f"{LATE}.ready did not come" in ended.error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from", "2026-01-01"], "give --from and --to together"),
        (["--from", "2026-01-03", "--to", "2026-01-01"], "is later than --to"),
        (["--as-of", "monday"], "--as-of 'monday' is not a date; write it like 2026-01-31"),
        (["--as-of", "2026-01-01", "--from", "2026-01-01", "--to", "2026-01-02"], "or --as-of alone"),
    ],
)
def test_mistakes_are_told_in_one_line(week: Week, words: list[str], message: str) -> None:
    ended = des(week.folder, "run", "-c", "week.toml", *words)
    assert ended.code == 2 and message in ended.error and ended.error.count("\n") == 1


def test_a_name_is_run_once_at_a_time(week: Week) -> None:
    lease.take(week.config, "somebody else")
    run_log = Path(week.config.run.dir) / "run.log"
    before = run_log.read_bytes()
    try:
        ended = des(week.folder, "run", "-c", "week.toml", "--as-of", DAYS[7])
        assert ended.code == 1 and "another run of week is at work (somebody else on " in ended.error
        assert before and run_log.read_bytes() == before, "the log of the run that is at work"
    finally:
        lease.release(week.config, "somebody else")
    assert not storage.exists(lease.uri_of(week.config))


def test_a_lease_ends_with_its_holder(week: Week, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of this host that is gone holds nothing; one elsewhere is waited for, unless it renews."""
    monkeypatch.setattr(lease, "LOOK_S", 0.05)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    lease.take(week.config, "killed", dead.pid)
    lease.take(week.config, "mine", os.getpid())
    lease.release(week.config, "another's")
    with pytest.raises(BusyError, match="another run of week is at work"):
        lease.take(week.config, "yours", os.getpid())
    lease.release(week.config, "mine")
    uri = lease.uri_of(week.config)
    elsewhere = lease.Lease(holder="pod", host="elsewhere", pid=1, expires=time.time() + 0.5)
    elsewhere.write(uri)
    lease.take(week.config, "its successor", os.getpid())
    lease.release(week.config, "its successor")
    elsewhere.model_copy(update={"expires": time.time() + 60}).write(uri)
    renewed = elsewhere.model_copy(update={"expires": time.time() + 61})
    later = threading.Timer(0.3, lambda: renewed.write(uri))
    later.start()
    with pytest.raises(BusyError, match="pod on elsewhere"):
        lease.take(week.config, "yours", os.getpid())
    later.join()
    storage.delete(uri)


MEASURED = (
    *("seconds", "samples_per_s", "peak_rss_mb", "memory", "evaluate_memory", "exchange", "profile", "ms_per_step"),
    *("inputs", "checkpoint", "checkpoints", "reference", "table", "training_sha256", "new_rows"),
)
"""What a clock or this machine decides, references of files that hold such or lie elsewhere, and the table's growth,
which may know the next batch already."""


def lasting(value: Any) -> Any:
    """A record without what was measured."""
    if isinstance(value, dict):
        return {key: lasting(inner) for key, inner in value.items() if key not in MEASURED}
    return [lasting(inner) for inner in value] if isinstance(value, list) else value


def test_killed_after_every_step_it_ends_the_same(week: Week, tmp_path: Path) -> None:
    """Day 1 elsewhere: SIGKILL after each step, begin again; the same key, metrics and verdict, and one version."""
    words = ("run", "-c", "week.toml", "--as-of", DAYS[0], "--set", f"run.dir={tmp_path}/runs")
    for step in STEPS:
        with start(week.folder, *words) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("event=done") and f" name={step} " in line:
                    os.killpg(process.pid, signal.SIGKILL)
                    break
            else:
                raise AssertionError(f"{step} was never done: {process.stderr and process.stderr.read()}")
    ended = des(week.folder, *words)
    assert ended.code == 0, ended.error
    first = week.day(DAYS[0])
    assert ended.answer["run_key"] == first.key
    assert ended.answer["version"] == 1 and ended.answer["aliases"] == ["candidate", "champion"]
    assert versions(f"sqlite:///{tmp_path}/runs/mlflow.db") == 1
    folder = f"{tmp_path}/runs/runs/{first.key[:12]}"
    for name in ("report.json", "gate.json", "new_rows.json"):
        assert lasting(storage.read_json(f"{folder}/{name}")) == lasting(storage.read_json(first.path(name))), name
    # Equal runs have equal weights and equal manifests, so that the key of the day that goes on from here is the same.
    weights = [storage.read_json(f"{place}/training.json")["checkpoint"] for place in (folder, first.folder)]
    assert weights[0].rpartition("#")[2] == weights[1].rpartition("#")[2]
    sizes = [storage.read_json(f"{place}/report.json")["table"][-1] for place in (folder, first.folder)]
    assert sizes[0] == sizes[1]
    assert pq.read_table(f"{folder}/predictions") == pq.read_table(first.path("predictions"))


def test_pins_survive_a_move(week: Week, tmp_path: Path) -> None:
    """References in inputs.json are relative to storage.root."""
    run = runs(week)[-1]
    shutil.copytree(week.config.storage.root, tmp_path / "moved")
    config = load_config(week.folder / "week.toml", (f"run.dir={tmp_path}/moved", "run.name=week"))
    moved = reopen(
        config, Reference(f"{tmp_path}/moved/runs/{run.key[:12]}/inputs.json", run.reference("inputs.json").sha256)
    )
    assert moved.key == run.key and isinstance(moved.day, Day)
    assert Dataset.load(under_root(config, storage.read_json(moved.path("inputs.json"))["dataset"])).rows("test") == 300
    assert stages.ingest(config).numbers["rows"]["train"] > 0, "whole logs, in the same store"
    assert storage.exists(moved.dataset.uri)


def test_a_day_without_logs_is_told(week: Week) -> None:
    with pytest.raises(DataError, match=r"2026-02-01: no logs of that day; there are 2026-01-03"):
        stages.day_parts(week.config, "2026-02-01")

"""Laws of the champion's scores: which rows, whose definitions, and nothing that it has seen."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from des_core import storage
from des_core.config import Config, parse_config
from des_core.contracts import LABEL, Dataset, Reference, Segment
from des_core.data.feed.batches import Stream
from des_core.data.store import features, windows
from des_core.errors import ConfigError, RegistryError
from des_core.release.judge import champion
from des_core.release.judge.gate import decide
from des_core.release.registry import registry
from des_core.release.serve import serving
from des_core.run import Day, Run, pin
from des_core.verdict import Champion, NewRows, Verdict
from tests import columns
from tests.engine.group import Group

DAYS = ("2026-01-01", "2026-01-02", "2026-01-03")
ROWS = 400
FIELDS: list[dict[str, Any]] = [
    {"name": "user"},
    {"name": "tags", "kind": "multi"},
    {"name": "price", "kind": "numeric", "transform": "standard"},
]


def config_of(root: Path, fields: list[dict[str, Any]] = FIELDS, rate: float = 0.1, **gate: Any) -> Config:
    return parse_config(
        {
            "run": {"name": "shop", "dir": str(root)},
            "train": {"batch": 64, "workers": 2},
            "optimizer": {"rows": {"learning_rate": rate}},
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


class Shop:
    """Two workers, and the versions that the registry is said to have."""

    def __init__(self, workers: Group) -> None:
        self._workers = workers
        self.links: dict[str, SimpleNamespace] = {}
        self.launched: list[str] = []

    def do(self, case: str, run: Run) -> None:
        day = None if run.day is None else run.day.model_dump(mode="json")
        self._workers.do(case, config=run.config.model_dump_json(), dataset=str(run.dataset), day=day)

    def trained(self, run: Run) -> Run:
        self.do("train", run)
        return run

    def register(self, version: str, run: Run) -> Run:
        """A run that was trained and evaluated, as a version."""
        self.trained(run)
        self.do("report", run)
        checkpoint = storage.read_json(run.path("training.json"))["checkpoint"]
        relative = checkpoint.removeprefix(run.config.storage.root.rstrip("/") + "/")
        self.links[version] = SimpleNamespace(version=version, run_key=run.key, checkpoint=relative)
        return run

    def score(self, run: Run) -> Champion:
        """champion.json, and the report where it is missing."""
        return Champion.load(champion.score(run, self.launcher("report", run))[0])

    def score_new(self, run: Run) -> NewRows:
        return NewRows.load(champion.score_new(run, self.launcher("new_rows", run))[0])

    def launcher(self, case: str, run: Run) -> Callable[[], None]:
        def launch() -> None:
            self.launched.append(case)
            self.do(case, run)

        return launch


@pytest.fixture
def shop(group: Callable[[int], Group], monkeypatch: pytest.MonkeyPatch) -> Shop:
    """Other versions than it has are looked up in the real registry."""
    made = Shop(group(2))
    real = registry.version

    def version(model_uri: str, tracking_uri: str) -> Any:
        return made.links.get(model_uri.rpartition("/")[2]) or real(model_uri, tracking_uri)

    monkeypatch.setattr(registry, "version", version)
    monkeypatch.setattr(registry, "chain", lambda uri, tracking: [])
    return made


def rows_of(dataset: Reference, *splits: str) -> pa.Table:
    """Labels and samples of splits, in stored order."""
    return pa.concat_tables(
        table for split in splits for table in Stream(dataset, split, [LABEL, "_file", "_row"]).batches(1 << 16)
    )


def samples(run: Run, *splits: str) -> set[tuple[str, int]]:
    table, files = rows_of(run.dataset, *splits), Dataset.load(run.dataset).files
    return {(files[file], row) for file, row in zip(table["_file"].to_pylist(), table["_row"].to_pylist(), strict=True)}


def served(version: Run, dataset: Reference, *splits: str) -> tuple[np.ndarray, np.ndarray]:
    """Labels and a version's scores of rows, by the code that serves it and with its own definitions."""
    fields = Dataset.load(version.dataset).fields
    theirs = Dataset.load(dataset).model_copy(update={"fields": fields})
    reference = theirs.write(dataset.uri.replace(".json", "-served.json"))
    folder = version.path("served")
    serving.write(version, folder)
    scorer = serving.Scorer(folder, version.config.storage.root)
    found = [scorer.score_dataset(reference, split)[1:] for split in splits]
    return tuple(np.concatenate(column).astype(np.float64) for column in zip(*found, strict=True))  # type: ignore[return-value]


def near(found: dict[str, float], labels: np.ndarray, scores: np.ndarray) -> None:
    """Equal to the metrics of these scores, as far as another order of sums in float32 lets them be."""
    wanted = columns.measured("click", labels, scores).metrics
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, abs=2e-5), name


def test_new_rows_are_the_windows_and_none_that_the_champion_was_trained_on(root: Path, shop: Shop) -> None:
    config = config_of(root)
    first = shop.register("1", run_of(config, DAYS[0]))
    assert first.day is not None
    run = run_of(config, DAYS[1], "1", {DAYS[0]: first.day.cut})
    record = shop.score_new(run)
    assert not samples(run, "train", "test") & samples(first, "train"), "seen"
    assert samples(first, "test") < samples(run, "train", "test"), "the champion's own tail is new to it"
    assert champion.score_new(run, shop.launcher("new_rows", run)) == (run.reference("new_rows.json"), True)
    assert shop.launched == ["new_rows"]
    assert (record.as_of, record.version, record.samples) == (DAYS[1], "1", len(samples(run, "train", "test")))
    assert {day: each["samples"] for day, each in record.days.items()} == {DAYS[0]: ROWS * 0.1, DAYS[1]: ROWS}
    labels, scores = served(first, run.dataset, "train", "test")
    near(record.metrics, labels, scores)
    near({key: value for key, value in record.days[DAYS[1]].items() if key != "samples"}, labels[40:], scores[40:])
    assert sorted(record.drift) == ["price", "tags", "user"]
    assert record.drift["price"]["psi"] > 1, "prices moved by a day"
    assert not storage.exists(run.path("score-found.json")) and not storage.exists(run.path("score-asked.json"))


def test_without_weights_to_go_on_from_only_rows_that_the_champion_has_not_seen_count(root: Path, shop: Shop) -> None:
    config = config_of(root)
    first = shop.register("1", run_of(config, DAYS[1], trained={DAYS[0]: 0}))
    run = run_of(config, DAYS[2], "1", dict.fromkeys(DAYS[:2], 0), checkpoint="")
    assert samples(first, "train") < samples(run, "train"), "trained from nothing, on all days"
    record = shop.score_new(run)
    assert record.samples == len(samples(run, "train", "test") - samples(first, "train"))
    assert {day: each["samples"] for day, each in record.days.items()} == {DAYS[1]: ROWS * 0.1, DAYS[2]: ROWS}
    # The same by rows that are later than what it has seen.
    tail = run_of(config, DAYS[2], "1", {DAYS[1]: first.day.cut}) if first.day else run
    near(record.metrics, *served(first, tail.dataset, "train", "test"))


def test_without_a_champion_there_is_drift_only(root: Path, shop: Shop) -> None:
    run = run_of(config_of(root), DAYS[1], trained={DAYS[0]: 0})
    record = shop.score_new(run)
    assert (record.version, record.samples, record.metrics, record.days) == ("", 0, {}, {})
    assert set(record.drift) == {"price", "tags", "user"}
    assert shop.score_new(run_of(config_of(root), DAYS[0])).drift == {}
    assert not shop.launched
    assert shop.score(shop.trained(run)).status == "none"
    assert shop.launched == ["report"] and storage.exists(run.path("report.json"))


def test_the_champion_is_compared_in_the_launch_that_writes_the_report(root: Path, shop: Shop) -> None:
    config = config_of(root, slices=["user", "tags"])
    first = shop.register("1", run_of(config, DAYS[0]))
    run = shop.trained(run_of(config, DAYS[1], "1"))
    record = shop.score(run)
    assert (record.status, record.version, shop.launched) == ("scored", "1", ["report"])
    assert record.comparison is not None
    labels, theirs = served(first, run.dataset, "test")
    near(record.comparison.theirs.metrics, labels, theirs)
    own = storage.read_json(run.path("report.json"))["measured"]
    ours = served(run, run.dataset, "test")[1]
    near(own["metrics"], labels, ours)
    difference, interval = columns.auc_difference(labels, ours, theirs)
    assert record.comparison.difference == pytest.approx(difference, abs=2e-3)
    assert record.comparison.interval == pytest.approx(interval, abs=2e-3)
    assert set(record.comparison.slices) == {"user", "tags"} and record.comparison.slices["tags"]
    assert champion.score(run, shop.launcher("report", run)) == (run.reference("champion.json"), True)
    # Of the report alone nothing is left out, and the same again gives the same record.
    before = storage.read_bytes(run.path("champion.json"))
    storage.delete(run.path("champion.json"))
    shop.score(run)
    assert storage.read_bytes(run.path("champion.json")) == before
    assert not [name for name in storage.list_folder(run.folder) if "asked" in name or "found" in name]
    assert not [name for name in storage.list_folder(config.features_root) if name.startswith("seen-by")]


def test_an_answer_that_an_attempt_left_is_taken_and_one_to_another_question_is_not(root: Path, shop: Shop) -> None:
    config = config_of(root)
    shop.register("1", run_of(config, DAYS[0]))
    run = shop.trained(run_of(config, DAYS[1], "1"))
    shop.score(run)
    storage.delete(run.path("champion.json"))

    def killed() -> None:
        shop.launcher("report", run)()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        champion.score(run, killed)
    assert storage.exists(run.path("evaluate-found.json"))
    shop.score(run)
    assert shop.launched == ["report", "report"], "what it had found was kept"
    storage.delete(run.path("champion.json"))
    storage.write_json(run.path("evaluate-found.json"), {"asked": "0" * 64})
    shop.score(run)
    assert shop.launched == ["report"] * 3


def test_other_slices_are_compared_anew(root: Path, shop: Shop) -> None:
    shop.register("1", run_of(config_of(root), DAYS[0]))
    run = shop.trained(run_of(config_of(root), DAYS[1], "1"))
    shop.score(run)
    again = run_of(config_of(root, slices=["tags"]), DAYS[1], "1")
    assert again.key == run.key
    record = shop.score(again)
    assert record.slices == ("tags",) and record.comparison is not None and record.comparison.slices["tags"]
    assert shop.launched == ["report", "report"]


def test_numbers_mean_what_they_meant_to_the_champion(root: Path, shop: Shop) -> None:
    """Prices are standardised by the champion's mean, not by that of the day that it scores."""
    first = shop.register("1", run_of(config_of(root), DAYS[0]))
    run = shop.trained(run_of(config_of(root), DAYS[1], "1"))
    record = shop.score(run)
    assert record.comparison is not None
    near(record.comparison.theirs.metrics, *served(first, run.dataset, "test"))
    # By the day's own mean they would be others.
    report = storage.read_json(first.path("report.json"))
    report["dataset"]["definitions"] = storage.read_json(run.path("report.json"))["dataset"]["definitions"]
    storage.write_json(first.path("report.json"), report)
    storage.delete(run.path("champion.json"))
    other = shop.score(run).comparison
    assert other is not None
    assert abs(other.theirs.metrics["logloss"] - record.comparison.theirs.metrics["logloss"]) > 1e-4


def test_other_definitions_are_ingested_again_apart_and_joined(root: Path, shop: Shop) -> None:
    theirs = config_of(root, [{"name": "user"}, {"name": "tags"}, {"name": "price", "kind": "numeric"}])
    first = shop.register("1", run_of(theirs, DAYS[0]))
    run = shop.trained(run_of(config_of(root), DAYS[1], "1"))
    record = shop.score_new(run)
    assert (record.version, record.samples) == ("1", ROWS)
    day = run_of(theirs, DAYS[1])
    everything = {"train": (Segment(part=DAYS[1], start=0, stop=ROWS),), "valid": (), "test": ()}
    whole = Dataset.load(day.dataset).model_copy(update={"splits": everything})
    near(record.metrics, *served(first, whole.write(day.dataset.uri.replace("window-", "window-x")), "train"))
    found = shop.score(run)
    assert found.comparison is not None
    near(found.comparison.theirs.metrics, *served(first, day.dataset, "test"))
    assert not storage.exists(champion._scratch(run)), "the scratch store is gone"
    other = run_of(config_of(root), DAYS[2], "1")
    assert champion._scratch(run) != champion._scratch(other)


def test_a_champion_whose_column_is_gone_stays_unless_bounds_may_decide(root: Path, shop: Shop) -> None:
    shop.register("1", run_of(config_of(root, [*FIELDS, {"name": "new"}]), DAYS[0]))
    for day in DAYS:
        path = root / "logs" / f"{day}.csv"
        path.write_text("".join(line.rpartition(",")[0] + "\n" for line in path.read_text().splitlines()))
    verdicts = {}
    for setting in ("keep", "absolute"):
        config = config_of(root, on_schema_change=setting, min_auc=0, max_ne=100, min_samples=10, max_psi=100)
        run = shop.trained(run_of(config, DAYS[1], "1"))
        record = shop.score_new(run)
        assert record.version == "" and "'new'" in record.reason and record.drift
        found = shop.score(run)
        assert (found.status, found.version) == ("not_comparable", "1") and "'new'" in found.reason
        verdicts[setting] = Verdict.load(decide(run))
        assert not storage.exists(champion._scratch(run))
    assert (verdicts["keep"].verdict, verdicts["absolute"].verdict) == ("not_comparable", "accept")
    assert "on_schema_change" in verdicts["absolute"].reasons[-1]


def test_a_champion_whose_weights_are_gone_or_damaged_is_not_comparable_and_it_is_said_why(
    root: Path, shop: Shop
) -> None:
    first = shop.register("1", run_of(config_of(root), DAYS[0]))
    config = config_of(root, min_auc=0, max_ne=100, min_samples=10, max_psi=100)
    run = shop.trained(run_of(config, DAYS[1], "1"))
    manifest = Path(storage.join(run.config.storage.root, shop.links["1"].checkpoint.partition("#")[0]))
    whole = manifest.read_bytes()
    manifest.write_bytes(whole[:-30])
    assert "has other bytes" in shop.score_new(run).reason
    found = shop.score(run)
    assert (found.status, found.reason.count("has other bytes")) == ("not_comparable", 1)
    assert Verdict.load(decide(run)).verdict == "not_comparable"
    manifest.unlink()
    storage.delete(run.path("champion.json"))
    found = shop.score(run)
    assert (found.status, found.reason) == ("not_comparable", f"its checkpoint {manifest} is gone")
    storage.delete(run.path("new_rows.json"))
    assert shop.score_new(run).reason == f"its checkpoint {manifest} is gone"
    manifest.write_bytes(whole)
    storage.delete(first.path("inputs.json"))
    storage.delete(run.path("champion.json"))
    assert f"its run {first.path('inputs.json')} is gone" in shop.score(run).reason


def test_a_reference_is_compared_too(root: Path, shop: Shop) -> None:
    config = config_of(root, reference="1", min_samples=10, max_psi=100)
    shop.register("1", run_of(config, DAYS[0]))
    shop.register("2", run_of(config_of(root, rate=0.02), DAYS[0]))
    run = shop.trained(run_of(config, DAYS[1], "2"))
    shop.score_new(run)
    record = shop.score(run)
    assert record.reference == "1" and record.reference_comparison is not None and record.comparison is not None
    assert record.reference_comparison.theirs.metrics != record.comparison.theirs.metrics
    verdict = Verdict.load(decide(run))
    assert (verdict.champion, verdict.reference) == ("2", "1")
    assert verdict.metrics["reference_auc"] != verdict.metrics["champion_auc"]


def test_a_reference_that_is_not_there_or_saw_the_rows_is_one_line(root: Path, shop: Shop) -> None:
    config = config_of(root, reference="7")
    run = run_of(config, DAYS[1])
    with pytest.raises(RegistryError, match=r"models:/shop/7"):
        shop.score(run)
    shop.register("7", run_of(config, DAYS[2]))
    with pytest.raises(ConfigError, match=rf"gate\.reference = 7 was trained as of {DAYS[2]} and may have seen rows"):
        shop.score(run)
    shop.register("7", pin(config, run.dataset))
    with pytest.raises(ConfigError, match=r"gate\.reference = 7: no day's run in storage.root trained it"):
        shop.score(run)


def test_a_day_is_compared_with_the_champion_of_a_week_before(
    root: Path, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drops that are within the bound each day add up; a version of long ago shows them."""

    def chain(*days: str) -> None:
        links = [SimpleNamespace(version=str(3 - number), as_of=day) for number, day in enumerate(days)]
        monkeypatch.setattr(registry, "chain", lambda uri, tracking: links)

    config = config_of(root, min_samples=10, max_psi=100)
    shop.register("1", run_of(config, DAYS[0]))
    shop.register("3", run_of(config_of(root, rate=0.02), DAYS[0]))
    run = shop.trained(run_of(config, DAYS[1], "3"))
    shop.score_new(run)
    before = (date.fromisoformat(DAYS[1]) - timedelta(days=7)).isoformat()
    chain(DAYS[0], DAYS[0], before)
    found = shop.score(run)
    assert (found.version, found.reference, found.reference_given) == ("3", "1", False)
    assert champion.score(run, shop.launcher("report", run))[1], "kept"
    verdict = Verdict.load(decide(run))
    assert verdict.reference == "1" and "reference_auc" in verdict.metrics
    chain(before)
    assert shop.score(run).reference == "", "the champion itself is of a week before"
    chain(DAYS[0])
    assert shop.score(run).reference == "", "nobody is"
    chain(DAYS[0], before)
    for setting, wanted in (("none", ""), ("1", "1")):
        other = run_of(config_of(root, reference=setting), DAYS[1], "3")
        assert champion._reference(other) == (wanted, True)
    # One that cannot score the rows is told, and the verdict is made without it.
    shop.links["1"].checkpoint = "checkpoints/gone/manifest.json#sha256:" + "0" * 64
    chain(DAYS[0], DAYS[0], before)
    record = shop.score(run)
    assert record.reference == "1" and "gone" in record.reference_reason
    verdict = Verdict.load(decide(run))
    assert verdict.verdict in ("accept", "reject") and "reference_auc" not in verdict.metrics

"""What stays in storage: what versions refer to, what is young, what is another's; and the rest goes whole."""

from __future__ import annotations

import os
import time
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest

from des_core import storage
from des_core.checkpoint import manifest as manifests
from des_core.config import Config
from des_core.contracts import Reference
from des_core.errors import RegistryError
from des_core.recurring import retention
from des_core.release.registry import registry
from des_core.release.registry.registry import Version
from tests.checkpoint.histories import history
from tests.finished import config_of

DAYS = [(date(2026, 1, 1) + timedelta(days=number)).isoformat() for number in range(50)]


class Place:
    """A run folder with runs, checkpoints and versions."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.known = folder, dict[int, tuple[str, str, tuple[str, ...]]]()
        self.noted: list[int] = []
        self.config = config_of(folder)
        self.root = Path(self.config.storage.root)
        monkeypatch.setattr(registry, "versions", lambda config: self.versions())
        monkeypatch.setattr(registry, "weights_deleted", lambda config, numbers: self.noted.extend(numbers))

    def versions(self) -> list[Version]:
        return [Version(number, aliases, *of) for number, (*of, aliases) in sorted(self.known.items(), reverse=True)]

    def with_(self, **limits: int) -> Config:
        return config_of(self.folder, *(f"retention.{key}={value}" for key, value in limits.items()))

    def run(self, key: str, name: str = "shop", spec: str = "", age_days: float = 0.0) -> str:
        """A run in storage; the address of its checkpoint's manifest, of two layers."""
        spec = spec or self.config.features_digest[:12]
        uri = self.root / "runs" / key / "inputs.json"
        dataset = str(Reference(f"features/{spec}/manifest.json", "0" * 64))
        storage.write_json(str(uri), {"name": name, "day": None, "dataset": dataset})
        os.utime(uri, (time.time() - age_days * 86_400,) * 2)
        built = self.folder / f"built-{key}"
        history(str(built), 1, 2, 4)
        target = self.root / "checkpoints" / key
        target.parent.mkdir(parents=True, exist_ok=True)
        (built / "run").rename(target)
        manifest = target / "step-0000000002" / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"run": "run"', f'"run": "{key}"'))
        return str(manifest)

    def version(self, number: int, key: str, *aliases: str, delta_of: str = "") -> None:
        """A registered run; as a delta it names the layers of another."""
        reference = manifests.reference(self.run(key))
        if delta_of:
            mine = manifests.read(reference)
            its = manifests.read(manifests.reference(str(self.checkpoint(delta_of, 2) / "manifest.json")))
            reference = mine.model_copy(update={"layers": (*its.layers, mine.layers[1])}).write(reference.uri)
        relative = reference.uri.removeprefix(f"{self.root}/")
        self.known[number] = (key, str(Reference(relative, reference.sha256)), aliases)

    def checkpoint(self, key: str, step: int) -> Path:
        return self.root / "checkpoints" / key / manifests.folder_name(step)

    def left(self, folder: str) -> list[str]:
        return sorted(path.name for path in (self.root / folder).iterdir())

    def clean(self, **limits: int) -> retention.Cleanup:
        config = self.with_(**limits)
        found = retention.plan(config)
        retention.apply(config, found)
        assert retention.plan(config).doomed == (), "nothing is left to delete"
        return found


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, monkeypatch)


def test_without_limits_nothing_goes(place: Place) -> None:
    place.version(1, "aaa")
    place.version(2, "bbb", "champion")
    place.run("ccc", age_days=900)
    assert place.clean().doomed == () and place.left("runs") == ["aaa", "bbb", "ccc"]


def test_weights_stay_that_a_kept_version_names_through_its_layers(place: Place) -> None:
    """Version 3 is a delta of version 1's layers: they stay, and so can version 1 be read; its run goes."""
    place.version(1, "aaa")
    place.version(2, "bbb")
    place.version(3, "ccc", "champion", "candidate", delta_of="aaa")
    found = place.clean(versions=1)
    assert place.left("runs") == ["ccc"] and place.left("checkpoints") == ["aaa", "ccc"]
    assert found.versions == (2,) == tuple(place.noted) and found.size > 1000
    for step in (1, 2):
        assert (place.checkpoint("aaa", step) / "blocks-00000.json").exists()
    champion = manifests.reference(str(place.checkpoint("ccc", 2) / "manifest.json"))
    for layer in manifests.read(champion).layers:
        manifests.readers(champion, layer)


def test_a_version_with_an_alias_stays_however_old(place: Place) -> None:
    for number, key in enumerate(("aaa", "bbb", "ccc", "ddd"), 1):
        place.version(number, key, *(("champion",) if number == 1 else ()))
    place.clean(versions=2)
    assert place.left("runs") == place.left("checkpoints") == ["aaa", "ccc", "ddd"]
    assert place.noted == [2]


def test_runs_without_a_version_stay_while_they_are_young_or_the_latest(place: Place) -> None:
    place.version(1, "aaa", "champion")
    place.run("old", age_days=40)
    place.run("new", age_days=2)
    place.run("latest", age_days=50)
    (place.root / "latest").write_text("latest\n")
    found = place.clean(days=30)
    assert place.left("runs") == ["aaa", "latest", "new"] == place.left("checkpoints")
    assert not found.versions


def test_another_names_runs_and_what_cannot_be_read_are_left_alone(place: Place) -> None:
    place.version(1, "aaa", "champion")
    place.run("theirs", name="other", age_days=400)
    place.run("odd", age_days=400)
    (place.root / "runs" / "odd" / "inputs.json").write_text("{")
    # At work elsewhere: it has checkpoints and no pin that is seen here.
    place.run("busy", age_days=400)
    (place.root / "runs" / "busy" / "inputs.json").unlink()
    place.clean(days=1, versions=1)
    assert place.left("checkpoints") == ["aaa", "busy", "odd", "theirs"]
    assert place.left("runs") == ["aaa", "busy", "odd", "theirs"]


def test_features_stay_as_long_as_a_window_may_want_them(place: Place) -> None:
    features = place.root / "features"
    for spec in (place.config.features_digest[:12], "gone", "kept", "theirs"):
        for day in DAYS:
            storage.write_bytes(str(features / spec / day / "rows.parquet"), b"rows")
    place.version(1, "aaa", "champion")
    place.run("bbb", spec="gone", age_days=90)
    place.run("ccc", spec="kept", age_days=3)
    place.run("ddd", name="other", spec="theirs", age_days=90)
    place.clean(days=10)
    assert place.left("features") == sorted([place.config.features_digest[:12], "kept", "theirs"])
    # recurring.max_days = 30 days may be in a window.
    assert place.left(f"features/{place.config.features_digest[:12]}") == DAYS[-30:]


def test_an_interrupted_deletion_leaves_no_manifest_and_is_gone_on_with(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.version(1, "aaa")
    place.version(2, "bbb", "champion")
    real, deleted = storage.delete, list[str]()

    def killed(uri: str) -> None:
        if len(deleted) == 1:
            raise OSError("killed")
        deleted.append(uri)
        real(uri)

    monkeypatch.setattr(storage, "delete", killed)
    config = place.with_(versions=1)
    with pytest.raises(OSError, match="killed"):
        retention.apply(config, retention.plan(config))
    assert deleted and deleted[0].endswith("manifest.json")
    monkeypatch.setattr(storage, "delete", real)
    place.clean(versions=1)
    assert place.left("runs") == place.left("checkpoints") == ["bbb"] and place.noted[:1] == [1]


def test_after_a_run_a_registry_that_is_down_costs_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def down(config: Any) -> list[Version]:
        raise RegistryError("MLflow is away")

    place.version(1, "aaa", "champion")
    monkeypatch.setattr(registry, "versions", down)
    retention.after_run(place.config)
    assert "not_cleaned" not in capfd.readouterr().err
    retention.after_run(place.with_(versions=1))
    assert "event=not_cleaned why='MLflow is away'" in capfd.readouterr().err
    assert place.left("runs") == ["aaa"]

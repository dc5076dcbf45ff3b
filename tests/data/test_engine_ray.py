"""Ingestion on a Ray cluster: the bytes are those of one process, though a machine of it dies."""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from des_core import cpus, storage
from des_core.config import Config, parse_config
from des_core.data.store import pieces, tasks
from des_core.data.store.features import ingest
from des_core.errors import ConfigError, UnavailableError
from tests.data.test_ingestion import FIELDS, write_log

HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY and "CI" not in os.environ, reason="needs Ray: pip install 'des-core[ray]'")


def config_of(root: str, logs: str, engine: str) -> Config:
    source = {"path": logs, "time": "t", "group": "user", "max_bad_share": 0.2}
    document = {"run": {"name": "r"}, "source": source, "fields": FIELDS, "storage": {"root": root}}
    return parse_config(document | {"ingest": {"engine": engine}})


def tree(uri: str, under: str = "") -> dict[str, bytes]:
    """Every file under an address but the digests of raw files."""
    found: dict[str, bytes] = {}
    for name in storage.list_folder(uri):
        inner = storage.join(uri, name)
        below = tree(inner, f"{under}{name}/")
        found |= below
        if not below and name != "digests.json":
            found[under + name] = storage.read_bytes(inner)
    return found


@pytest.fixture
def cluster(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Three machines, which know the bucket's server."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    monkeypatch.setenv("RAY_ADDRESS", made.address)
    yield made
    made.shutdown()


@needs_ray
@pytest.mark.filterwarnings("ignore")
def test_a_machine_that_dies_changes_nothing(
    tmp_path: Path, bucket: str, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(8):
        write_log(tmp_path / f"{number}.csv", 300, seed=number)
        storage.write_bytes(f"{bucket}/logs/{number}.csv", (tmp_path / f"{number}.csv").read_bytes())
    monkeypatch.setattr(cpus, "cpu_quota", lambda: 1)
    ingest(config_of(f"{bucket}/one", f"{bucket}/logs/*.csv", "local"))
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1)
    config = config_of(f"{bucket}/many", f"{bucket}/logs/*.csv", "ray")
    victim = cluster.add_node(num_cpus=2)
    ended = signal.getsignal(signal.SIGTERM)
    killed = []

    def kill() -> None:
        scratch = storage.join(config.features_root, ".scratch-all")
        while not any(name.startswith("piece-") for name in storage.list_folder(scratch)):
            time.sleep(0.02)
        cluster.remove_node(victim, allow_graceful=False)
        killed.append(victim)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    ingest(config)
    thread.join(30)
    assert killed
    assert tree(f"{bucket}/many") == tree(f"{bucket}/one")
    assert signal.getsignal(signal.SIGTERM) is ended


@pytest.mark.skipif(HAS_RAY, reason="Ray is installed")
def test_a_ray_that_is_not_installed_is_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"Ray is not installed; pip install"),
        tasks.engine_of(config_of(str(tmp_path), "log.csv", "ray")),
    ):
        pass


@needs_ray
def test_a_cluster_that_does_not_answer_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_log(tmp_path / "log.csv", 100)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(UnavailableError, match=r"^no Ray cluster answers at 127.0.0.1:9 \(.*name it in RAY_ADDRESS$"):
        ingest(config_of(str(tmp_path), str(tmp_path / "log.csv"), "ray"))

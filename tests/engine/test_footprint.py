"""Predicted memory: laws of the number of workers, and refusals that name a number that really fits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.launch import memory
from des_core import storage
from des_core.config import Config, parse_config, worker_limit
from des_core.contracts import Dataset, Segment
from des_core.engine import footprint
from des_core.engine.exchange.placement import placements
from des_core.engine.exchange.plan import layout
from des_core.engine.models import Model, build
from des_core.errors import ConfigError
from tests.engine import tiny
from tests.engine.test_placement import dataset

MB = 1 << 20


def config_of(**tables: dict[str, object]) -> Config:
    document = {
        "run": {"name": "x"},
        "source": {"format": "synthetic"},
        "train": {"lanes": 4096},
        "model": {"name": "deepfm"},
    }
    return parse_config(document | {name: document.get(name, {}) | table for name, table in tables.items()})  # type: ignore[operator]


def model_of(config: Config, data: Dataset) -> Model:
    return build(config.model, [field.name for field in data.row_fields], 0, 0)


def needed(config: Config, data: Dataset, workers: int, known: float = 0.0) -> footprint.Need:
    return footprint.need(config, data, next(placements(data, workers)), model_of(config, data), known)


def large(cardinalities: list[int], lookups: list[float]) -> Dataset:
    """Statistics of fifty million samples."""
    splits = {"train": (Segment(part="all", start=0, stop=50_000_000),), "valid": (), "test": ()}
    return dataset(cardinalities, lookups).model_copy(update={"splits": splits})


SHAPES = st.lists(st.tuples(st.integers(1, 30_000_000), st.floats(0.1, 20)), min_size=1, max_size=6).map(
    lambda pairs: large([many for many, _ in pairs], [each for _, each in pairs])
)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(1, 9), st.integers(2, 4))
def test_cut_finer_no_worker_ever_needs_more(data: Dataset, workers: int, times: int) -> None:
    """N workers and a multiple of N: each piece of the finer cut lies in one of the coarser. Cuts that moved to a
    table's edge may lie 2 % of a share elsewhere, and one bucket more may tip the power of two of an index."""
    config = config_of()
    coarse, fine = (needed(config, data, number) for number in (workers, workers * times))
    assert fine.owned.max() <= coarse.owned.max() * 1.021 + 30_000_000 / 256
    slack = 0.05 * coarse.most + 2 * footprint.slot_bytes(np.array([30_000_000 / 256]))[0] * 4
    assert fine.most <= coarse.most + slack


@settings(max_examples=20, deadline=None)
@given(SHAPES, st.floats(0.05, 1.1))
def test_a_refusal_names_the_smallest_number_that_fits(data: Dataset, share: float) -> None:
    config = config_of()
    model = model_of(config, data)
    whole = footprint.need(config, data, next(placements(data, 1)), model).most
    limit = footprint.PROCESS_BYTES + share * (whole - footprint.PROCESS_BYTES), "a test"
    smallest = footprint.smallest_fit(config, data, model, lambda _: limit)
    # Beyond these not every number is tried, and there one may fit where a larger one does not.
    for fewer in {1, min(smallest // 2, footprint.EACH_TRIED), smallest - 1} & set(range(1, smallest)):
        with pytest.raises(ConfigError, match=rf"set train\.workers to {smallest},") as caught:
            footprint.fit(config, data, fewer, model, lambda _: limit)
        assert "\n" not in str(caught.value)
    if smallest:
        found = footprint.fit(config, data, smallest, model, lambda _: limit)
        assert footprint.need(config, data, found, model).most <= limit[0]
    else:
        assert all(footprint.placed(config, data, number, model, limit[0]) is None for number in (1, 2, 3, 16, 1024))


def test_where_lookups_and_rows_lie_apart_memory_decides_the_placement() -> None:
    data = large([1_000_000] * 2 + [10] * 6, [1.0, 1.0, *[30.0] * 6])
    config = config_of(model={"factors": 256})
    model = model_of(config, data)
    possible = [footprint.need(config, data, each, model).most for each in placements(data, 4)]
    assert possible[0] > 2 * min(possible)
    found = footprint.placed(config, data, 4, model, min(possible))
    assert found is not None and footprint.need(config, data, found, model).most == min(possible)
    assert footprint.placed(config, data, 4, model, 0.999 * min(possible)) is None


@pytest.mark.parametrize(
    ("table", "grows"),
    [
        ({"model": {"factors": 32}}, True),
        ({"optimizer": {"rows": {"name": "sgd"}}}, False),
        ({"table": {"max_rows": 100_000}}, False),
        ({"train": {"batch": 65_536}}, True),
        ({"train": {"precision": "fp64"}}, True),
        ({"model": {"hidden": [4096, 4096]}}, True),
        ({"table": {"admit_count": 2}}, True),
        ({"table": {"admit_count": 1_000_000}}, False),
    ],
)
def test_what_takes_more_memory_is_predicted_to(table: dict[str, dict[str, object]], grows: bool) -> None:
    data = large([1_000_000, 300_000], [1.0, 3.0])
    usual, other = (needed(config, data, 2).train.max() for config in (config_of(), config_of(**table)))
    assert other > usual if grows else other < usual


def test_rows_on_a_gpu_take_none_of_the_main_memory() -> None:
    data = large([1_000_000], [1.0])
    here, there = needed(config_of(), data, 1), needed(config_of(train={"device": "cuda"}), data, 1)
    copied = there.parts["checkpoint"][0] - here.parts["checkpoint"][0]
    assert here.train[0] - there.train[0] == pytest.approx(here.parts["rows"][0] + here.parts["dense"][0] - copied)
    assert copied == pytest.approx(here.parts["rows"][0] * 7 / 8), "a save copies all rows to the host"
    assert there.device[0] > here.parts["rows"][0]


def test_a_champions_rows_are_counted_as_far_as_max_rows_lets_them() -> None:
    data = large([1_000_000], [1.0])
    alone, after = needed(config_of(), data, 2), needed(config_of(), data, 2, known=5_000_000)
    assert after.owned.sum() == pytest.approx(alone.owned.sum() + 5_000_000)
    bounded = needed(config_of(table={"max_rows": 2_000_000}), data, 2, known=5_000_000)
    assert bounded.owned.sum() == pytest.approx(2_000_000)


def test_a_table_holds_what_is_predicted_of_its_rows() -> None:
    """By the engine's own count, for each rule: rows, state and index."""
    import torch

    from des_core.config import TableConfig
    from des_core.engine.weights.optimizer import state_width
    from des_core.engine.weights.table import Table

    for rule in ("sgd", "rowwise_adagrad", "adam"):
        config = config_of(optimizer={"rows": {"name": rule}}, model={"name": "fm", "factors": 8})
        predicted = needed(config, large([50_000], [1.0]), 1)
        table = Table(9, state_width(rule, 9), 0, 0.01, TableConfig(), torch.device("cpu"), torch.float32)
        ids = np.random.default_rng(0).integers(-(1 << 63), 1 << 63, 50_000)
        table.commit(table.stage(ids, np.zeros(len(ids), np.uint16), np.ones(len(ids), np.uint32), 1))
        held = table.memory_bytes - table.candidates.memory_bytes
        assert predicted.parts["rows"][0] + predicted.parts["index"][0] == pytest.approx(held)


# Who says what a worker may have.


def test_the_config_says_it_or_the_machine_does(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cluster = {"backend": "pytorchjob", "nodes": 2, "nproc_per_node": 2, "memory": "4Gi"}
    cluster = config_of(cluster=on_cluster, train={"workers": 4})
    share, why = worker_limit(0, cluster.cluster)
    assert share == (4096 - 230) * MB / 2 and why == "cluster.memory = 4Gi over 2 workers of a pod"
    assert worker_limit(100, cluster.cluster) == (100 * MB, "train.worker_memory_mb = 100")
    assert worker_limit(0, config_of(cluster={"memory": "4Gi"}).cluster) == (0.0, ""), "nothing runs in a pod"
    monkeypatch.setattr(memory, "memory_bytes", lambda: 8e9)
    assert memory.limit_of(config_of())(4) == (2e9, "this machine's 8 GB over 4 local workers")
    unset = config_of(cluster=on_cluster | {"memory": ""}, train={"workers": 4})
    assert memory.limit_of(unset)(4) == (0.0, "")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("", 0),
        ("1024", 1024),
        ("2k", 2000),
        ("1.5Ki", 1536),
        ("3M", 3e6),
        ("4Mi", 4 << 20),
        ("5G", 5e9),
        ("1Ti", 1 << 40),
    ],
)
def test_memory_as_kubernetes_writes_it(text: str, size: float) -> None:
    assert config_of(cluster={"memory": text}).cluster.memory_bytes == size


def test_the_smaller_of_machine_and_control_group(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemFree: 1 kB\nMemTotal:       8000 kB\n")
    assert memory.memory_bytes(str(tmp_path), str(tmp_path / "meminfo")) == 8000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.memory_bytes(str(tmp_path), str(tmp_path / "meminfo")) == 8000 * 1024
    (tmp_path / "memory.max").write_text("4096000\n")
    assert memory.memory_bytes(str(tmp_path), str(tmp_path / "meminfo")) == 4_096_000


def test_a_run_that_cannot_fit_is_refused_where_it_is_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny.run(tmp_path, train={"workers": 2})
    memory.check(run)
    monkeypatch.setattr(memory, "memory_bytes", lambda: 700e6)
    with pytest.raises(ConfigError, match=r"^2 workers would need up to \d+ MB each, and may have 350 MB each \(th"):
        memory.check(run)
    monkeypatch.setattr(memory, "memory_bytes", lambda: 1000e6)
    with pytest.raises(ConfigError, match=r"500 MB each .*; set train\.workers to 1, or lower table\.max_rows"):
        memory.check(run)
    limited = tiny.run(tmp_path, train={"workers": 2, "worker_memory_mb": 300})
    with pytest.raises(ConfigError, match=r"\(train\.worker_memory_mb = 300\): .* no other number of workers"):
        layout(limited.config, Dataset.load(run.dataset), run.dataset, 2, False)


def test_what_is_plenty_is_never_refused() -> None:
    """Where nothing is reckoned, reckoning would have found that it fits."""
    random = np.random.default_rng(0)
    for name in ("lr", "deepfm", "dcn_v2", "autoint", "dlrm"):
        data = large((10 ** random.uniform(0, 7, 8)).astype(int).tolist(), random.uniform(0.1, 9, 8).tolist())
        config = config_of(model={"name": name, "hidden": [1024, 512]}, train={"batch": 65_536})
        most = needed(config, data, 1).most
        low, high = 1e8, 1e13
        while high / low > 1.01:
            middle = (low * high) ** 0.5
            low, high = (low, middle) if memory._is_plenty(config, data, middle) else (middle, high)
        assert high > most


def test_a_champions_rows_are_read_from_its_own_training(tmp_path: Path) -> None:
    run = tiny.run(tmp_path)
    assert footprint.champion_rows(run) == 0.0
    root = run.config.storage.root
    storage.write_json(f"{root}/runs/abc/training.json", {"table": [{"rows": 7.0}, {"rows": 42.0}]})
    from dataclasses import replace

    from des_core.run import Day

    day = Day(as_of="2026-01-02", days={}, cut=0, checkpoint=f"checkpoints/abc/step-1/manifest.json#sha256:{'0' * 64}")
    assert footprint.champion_rows(replace(run, day=day)) == 42.0

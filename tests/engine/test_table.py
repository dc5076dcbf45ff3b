"""The index is a dict; rows are born the same everywhere and outlive growth."""

from __future__ import annotations

import numpy as np
import torch

from des_core.engine import index
from des_core.engine.table import Table, first_values


def make(seed: int = 1) -> Table:
    return Table(width=4, state_width=2, seed=seed, init=0.1, device=torch.device("cpu"), dtype=torch.float32)


def test_slots_are_those_of_a_dict_through_growth() -> None:
    rng = np.random.default_rng(0)
    table, oracle = make(), {}
    edge_cases = np.array([0, -1, 1 << 32, -(1 << 63), (1 << 63) - 1], np.int64)
    for batch in range(30):
        drawn = rng.zipf(1.2, 4000) ** 3 if batch % 2 else rng.integers(-(1 << 63), (1 << 63) - 1, 4000)
        ids = np.unique(np.concatenate([drawn.astype(np.int64), edge_cases]))
        rng.shuffle(ids)
        before = table.find(ids)
        assert before.tolist() == [oracle.get(i, -1) for i in ids.tolist()]
        slots = table.find_or_insert(ids, np.zeros(len(ids), np.uint16))
        for i, slot in zip(ids.tolist(), slots.tolist(), strict=True):
            assert oracle.setdefault(i, slot) == slot
    assert table.used == len(oracle) == len(set(oracle.values()))
    assert 0 < table.load <= index.MAX_LOAD
    assert np.array_equal(table.ids[[oracle[i] for i in oracle]], list(oracle))


def test_ids_that_share_tag_or_seat_stay_apart() -> None:
    same_seat = (np.arange(500, dtype=np.int64) << 40) | 7
    same_tag = np.arange(500, dtype=np.int64) | (5 << 50)
    ids = np.concatenate([same_seat, same_tag])
    table = make()
    slots = table.find_or_insert(ids, np.zeros(len(ids), np.uint16))
    assert np.array_equal(table.find(ids), slots) and len(set(slots)) == 1000
    assert (table.find(ids ^ (1 << 20)) == -1).all()


def test_dedupe_is_unique_with_inverse() -> None:
    ids = np.random.default_rng(3).zipf(1.3, 10_000).astype(np.int64)
    unique, inverse, first = index.dedupe(ids)
    assert np.array_equal(unique[inverse], ids)
    assert np.array_equal(ids[first], unique)
    assert sorted(unique) == sorted(set(ids.tolist()))
    assert np.all(np.diff(first) > 0)


def test_growth_keeps_rows_and_state() -> None:
    table = make()
    table.find_or_insert(np.arange(900, dtype=np.int64), np.zeros(900, np.uint16))
    table.rows_SK[:900] = torch.arange(900)[:, None].float()
    table.state_SZ[:900] = 7
    slots = table.find_or_insert(np.arange(5000, dtype=np.int64), np.zeros(5000, np.uint16))
    assert np.array_equal(slots[:900], np.arange(900))
    assert torch.equal(table.rows_SK[:900, 2], torch.arange(900).float())
    assert (table.state_SZ[:900] == 7).all() and (table.state_SZ[900:5000] == 0).all()


def test_first_values_depend_on_seed_and_id_alone() -> None:
    ids = np.random.default_rng(0).integers(-(1 << 62), 1 << 62, 20_000)
    values = first_values(ids, 8, seed=4, init=0.05)
    assert np.array_equal(first_values(ids[::-1].copy(), 8, 4, 0.05), values[::-1])
    assert not np.array_equal(first_values(ids, 8, 5, 0.05), values)
    assert abs(values.std() - 0.05) < 1e-3 and abs(values.mean()) < 1e-3
    assert np.abs(np.corrcoef(values.T) - np.eye(8)).max() < 0.03
    one, other = make(), make()
    one.find_or_insert(ids[:100], np.zeros(100, np.uint16))
    other.find_or_insert(ids[99::-1].copy(), np.zeros(100, np.uint16))
    assert torch.equal(one.rows_SK[one.find(ids[:100])], other.rows_SK[other.find(ids[:100])])
    assert (one.rows_SK[:, 0] == 0).all()

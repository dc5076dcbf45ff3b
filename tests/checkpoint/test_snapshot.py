"""A snapshot is the table as it was, whatever training does to it while the snapshot is read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from des_core.config import TableConfig
from des_core.engine.weights import snapshot as snapshots
from des_core.engine.weights.snapshot import BlockRows
from des_core.engine.weights.table import Table

K, Z = 5, 1


def table_of(rows: int) -> Table:
    table = Table(K, Z, 0, 0.1, TableConfig(max_rows=10 * rows), torch.device("cpu"), torch.float32)
    generator = np.random.default_rng(0)
    look_up(table, np.unique(generator.integers(-(1 << 63), 1 << 63, rows)), 1)
    return table


def look_up(table: Table, ids: np.ndarray, step: int) -> np.ndarray:
    """One step that looks these ids up, and changes their rows."""
    tables = (ids & 3).astype(np.uint16)
    staged = table.stage(ids, tables, np.ones(len(ids), np.uint32), step)
    table.commit(staged)
    table.keep(staged.slots_U)
    table.rows_SK[torch.from_numpy(staged.slots_U)] += step
    table.state_SZ[torch.from_numpy(staged.slots_U)] += step
    return staged.slots_U


def content(table: Table) -> dict[int, Any]:
    numbers = torch.cat([table.rows_SK, table.state_SZ], 1).numpy().copy()
    counters = zip(table.tables.tolist(), table.counts.tolist(), table.last.tolist(), strict=True)
    return {one: (*of, *row) for one, of, row in zip(table.ids.tolist(), counters, numbers.tolist(), strict=True)}


def of_blocks(blocks: list[BlockRows]) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for block in blocks:
        ids = block.ids.view(np.uint64).tolist()
        assert ids == sorted(ids)
        numbers = np.concatenate([block.rows_nK, block.state_nZ], 1).tolist()
        for one, count, last, row in zip(
            block.ids.tolist(), block.counts.tolist(), block.last.tolist(), numbers, strict=True
        ):
            assert one not in found
            found[one] = (block.table, count, last, *row)
    return found


@pytest.mark.parametrize("since", [0, 2])
def test_steps_between_two_blocks_do_not_show(since: int) -> None:
    """Rows change, are born and move in memory while the snapshot is half read."""
    table = table_of(3000)
    generator = np.random.default_rng(1)
    look_up(table, np.sort(generator.choice(table.ids, 2000, replace=False)), 2)
    look_up(table, np.sort(generator.choice(table.ids, 1500, replace=False)), 3)
    wanted = {one: row for one, row in content(table).items() if row[2] > since}
    assert 0 < len(wanted) <= 3000
    blocks, step = [], 3
    for block in table.snapshot(since).blocks():
        blocks.append(block)
        step += 1
        if step < 12:
            new = np.unique(generator.integers(-(1 << 63), 1 << 63, 5000))
            look_up(table, np.concatenate([generator.choice(table.ids, 300, replace=False), new]), step)
    assert len(blocks) > 8 and of_blocks(blocks) == wanted


def test_more_copies_than_an_eighth_wait_for_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that would need them goes on when the snapshot is read; memory stays bounded."""
    import threading

    table = table_of(60_000)
    wanted = content(table)
    snapshot = table.snapshot(0)
    blocks: list[BlockRows] = []
    begun = threading.Event()

    def reading() -> None:
        begun.wait()
        blocks.extend(snapshot.blocks())

    thread = threading.Thread(target=reading)
    thread.start()
    kept = table.ids[:7000].copy()
    look_up(table, kept, 2)
    assert not snapshot.done.is_set() and snapshot._copied == 7000
    begun.set()
    look_up(table, table.ids[7000:20_000].copy(), 3)
    assert snapshot.done.is_set() and snapshot._copied == 7000
    thread.join()
    assert of_blocks(blocks) == wanted


def test_an_eviction_waits_for_the_reader() -> None:
    import threading

    table = table_of(2000)
    wanted = content(table)
    snapshot = table.snapshot(0)
    blocks: list[BlockRows] = []
    thread = threading.Thread(target=lambda: blocks.extend(snapshot.blocks()))
    thread.start()
    table._settings = TableConfig(max_rows=100)
    table.evict(2, lambda counts: counts)
    assert snapshot.done.is_set() and table.used == 100
    thread.join()
    assert of_blocks(blocks) == wanted
    gone = table.take_gone([])
    assert gone is not None and sum(len(ids) for ids, _ in gone) == 1900


def test_blocks_have_about_the_size_that_they_should() -> None:
    table = table_of(50_000)
    snapshot = table.snapshot(0)
    sizes = [len(block.ids) for block in snapshot.blocks()]
    wanted = snapshots.block_bytes(50_000 * snapshot.row_bytes) // snapshot.row_bytes
    assert max(sizes) <= 1.5 * wanted and sum(sizes) == 50_000 and len(sizes) < 4 * 50_000 / wanted

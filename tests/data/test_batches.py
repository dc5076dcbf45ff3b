"""The batch stream: every sample once, one order for all, and a cursor that is one number."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from des_core.contracts import LABEL, ROW, ROW_GROUP, Dataset, FieldSpec, Part, Reference, RowsFile, Segment
from des_core.data.feed import batches
from des_core.data.feed.batches import Ownership, Stream, everything, field_values, ids_of
from des_core.data.read.hashing import MISSING
from des_core.data.store.parts import footer_of

ROWS = {"2026-01-01": ROW_GROUP + 1000, "2026-01-02": 9 * ROW_GROUP + 5}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Two parts of several row groups, the first cut by the split."""
    folder = tmp_path_factory.mktemp("features")
    at = 0
    for part, rows in ROWS.items():
        numbers = np.arange(at, at + rows)
        table = pa.table({ROW: numbers, LABEL: pa.array(np.zeros(rows), pa.float32()), "key": numbers})
        pq.write_table(table, folder / f"{part}.parquet", row_group_size=ROW_GROUP)
        at += rows
    return Dataset(
        spec="",
        task="click",
        fields=(),
        has_group=False,
        has_time=False,
        parts={
            part: Part(
                files=(
                    RowsFile(
                        path=f"{part}.parquet", sha256="", footer=footer_of(f"{folder}/{part}.parquet"), rows=rows
                    ),
                )
            )
            for part, rows in ROWS.items()
        },
        splits={
            "train": (
                Segment(part="2026-01-01", start=10, stop=ROWS["2026-01-01"]),
                Segment(part="2026-01-02", start=0, stop=ROWS["2026-01-02"] - 7),
            )
        },
        files=(),
        stats={},
    ).write(str(folder / "manifest.json"))


def rows_of(stream: Stream, batch: int, epoch: int = 0, cursor: int = 0) -> list[np.ndarray]:
    return [table.column(ROW).to_numpy() for table in stream.batches(batch, epoch, cursor)]


def test_stored_order(store: Reference) -> None:
    stream = Stream(store, "train", [ROW])
    got = rows_of(stream, 100_000)
    assert np.array_equal(np.concatenate(got), np.arange(10, sum(ROWS.values()) - 7))
    assert {len(piece) for piece in got[:-1]} == {100_000}


def test_shuffle_is_a_permutation_that_epoch_and_seed_decide(store: Reference) -> None:
    first, again, second = (np.concatenate(rows_of(Stream(store, "train", [ROW], 7), 4096, e)) for e in (0, 0, 1))
    other = np.concatenate(rows_of(Stream(store, "train", [ROW], 8), 4096, 0))
    assert np.array_equal(first, again)
    assert np.array_equal(np.sort(first), np.arange(10, sum(ROWS.values()) - 7))
    assert (first == second).mean() < 0.01 and (first == other).mean() < 0.01
    assert abs(np.corrcoef(first[: 5 * ROW_GROUP], np.arange(5 * ROW_GROUP))[0, 1]) < 0.02


@pytest.mark.parametrize("seed", [None, 7])
def test_any_number_of_threads_reads_the_same(store: Reference, seed: int | None) -> None:
    one, three = (rows_of(Stream(store, "train", [ROW], seed, threads), 50_000, 1, 70_000) for threads in (1, 3))
    assert len(one) == len(three) > 9
    assert all(np.array_equal(a, b) for a, b in zip(one, three, strict=True))


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("steps", [1, 33, 150])
def test_a_cursor_goes_on_where_the_epoch_was(store: Reference, seed: int | None, steps: int) -> None:
    stream = Stream(store, "train", [ROW], seed)
    whole = rows_of(stream, 4096, epoch=2)
    rest = rows_of(stream, 4096, epoch=2, cursor=4096 * steps)
    assert len(rest) == len(whole) - steps
    assert all(np.array_equal(a, b) for a, b in zip(rest, whole[steps:], strict=True))


def test_owners_share_out_all_lookups() -> None:
    """Any ownership of buckets: every lookup has exactly one owner, with the same x."""
    fields = (
        FieldSpec(name="a", column="a", kind="categorical", table="t"),
        FieldSpec(name="m", column="m", kind="multi", pooling="mean", table="t"),
        FieldSpec(name="n", column="n", kind="numeric", transform="log1p", table="n"),
    )
    rng = np.random.default_rng(0)
    lists = [rng.integers(0, 100, rng.integers(1, 5)).tolist() for _ in range(300)]
    table = pa.table(
        {
            "a": rng.integers(0, 1000, 300),
            "m": pa.array(lists, pa.list_(pa.int64())),
            "n": pa.array([None if i % 9 == 0 else i - 100.0 for i in range(300)], pa.float32()),
        }
    ).slice(5, 250)
    whole = everything(fields).lookups(table)
    owner = {name: rng.integers(0, 3, batches.BUCKETS) for name in ("t", "n")}
    parts = []
    for worker in range(3):
        ownership = Ownership(fields, {name: buckets == worker for name, buckets in owner.items()})
        got = ownership.lookups(table)
        names = np.array([field.name for field in ownership.fields])[got.piece]
        parts += list(zip(got.ids.tolist(), got.sample.tolist(), names.tolist(), got.x.tolist(), strict=True))
    names = np.array([field.name for field in fields])[whole.piece]
    assert sorted(parts) == sorted(
        zip(whole.ids.tolist(), whole.sample.tolist(), names.tolist(), whole.x.tolist(), strict=True)
    )
    # A value has one id wherever its table is read, and another in another table.
    assert ids_of(np.array([3]), "t")[0] in whole.ids and ids_of(np.array([3]), "n")[0] not in whole.ids
    means = np.zeros(250)
    np.add.at(means, whole.sample[names == "m"], whole.x[names == "m"])
    np.testing.assert_allclose(means, 1, rtol=1e-6)


def test_numbers_scale_one_row_and_missing_has_its_own() -> None:
    table = pa.table({"n": pa.array([-3.0, None, 8.0], pa.float32())})

    def values(**options: object) -> tuple[list[int], list[float]]:
        keys, x, _ = field_values(table, FieldSpec(name="n", column="n", kind="numeric", table="n", **options))
        return keys.tolist(), np.round(x.astype(float), 5).tolist()

    number = batches.NUMBER
    assert values() == ([number, MISSING, number], [-3, 1, 8])
    assert values(transform="log1p")[1] == [-1.38629, 1, 2.19722]
    assert values(transform="standard", mean=2.0, std=5.0)[1] == [-1, 1, 1.2]
    assert values(transform="bucket", edges=(-3.0, 5.0)) == ([1, MISSING, 2], [1, 1, 1])

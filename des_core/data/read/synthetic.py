"""Click logs whose probabilities are known: a factorization machine that clicks.

    logit = bias + sum_f w_f[id_f] + w_price log1p(price) + w_hour[hour] + |sum_g z_g|^2 - sum_g |z_g|^2
    f over all fields; g over category, site, slot and region; z in R^4

The sums over g give all pairs: linear terms are for logistic regression to learn, the pairs for
factorization machines. The fields in pairs have few values, so that some 20,000 rows show them. Ids follow a
Zipf law; each day brings new ones, that get a percent or two of its traffic. An id's weights are a function of
(seed, id) alone, so days agree; a day's rows follow from (seed, day, rows per day).

Dims: R rows of a day, D ids of a field.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
from numba import njit, uint64

from des_core import storage
from des_core.config import FieldConfig
from des_core.data.read.hashing import I64, Array, hash_text, splitmix64

F64 = np.ndarray[Any, np.dtype[np.float64]]

VERSION = 1
"""Of the logs that the same arguments give."""

FIRST_DAY = date(2026, 1, 1)
TIME, LABEL, GROUP = "time", "label", "user"
"""Columns with the event's time in unix seconds, the click, and the group of GAUC."""

FIELDS = (
    *(
        FieldConfig(name=name)
        for name in ("user", "item", "category", "advertiser", "site", "slot", "device", "region")
    ),
    FieldConfig(name="tags", kind="multi", pooling="mean"),
    FieldConfig(name="price", kind="numeric", transform="log1p"),
    FieldConfig(name="hour", column=TIME, derive="hour"),
)
"""What a model reads of these logs."""

RANK_SCALES = (1.5, 1.1, 0.65, 0.37)
"""Of the planted factors: fewer samples reveal the first ones."""
BIAS = -1.0
NEW_SHARE = 0.012
"""Of a day's traffic, on ids first seen that day; as much again on those of the days before it."""


@dataclass(frozen=True)
class _Ids:
    """A field of ids: how many there are from the start, how many more each day, and what they weigh."""

    name: str
    letter: str
    first: int
    daily: int
    weight: float
    pair: float = 0.0


def _ids(rows_per_day: int) -> dict[str, _Ids]:
    """The fields; users and items grow with the traffic, so that an id is seen about as often."""
    users, items = max(rows_per_day // 160, 40), max(rows_per_day // 250, 30)
    fields = (
        _Ids("user", "u", users, max(users // 20, 2), 0.1),
        _Ids("item", "i", items, max(items // 20, 2), 0.1),
        _Ids("category", "c", 8, 0, 0.4, 0.34),
        _Ids("advertiser", "a", 15, 1, 0.1),
        _Ids("site", "s", 12, 1, 0.4, 0.34),
        _Ids("slot", "p", 6, 0, 0.4, 0.34),
        _Ids("device", "d", 4, 0, 0.1),
        _Ids("region", "r", 8, 1, 0.4, 0.34),
        _Ids("tags", "t", 24, 1, 0.15),
    )
    return {field.name: field for field in fields}


def day_name(day: int) -> str:
    """The date of day 0, 1, ..., as in 2026-01-01."""
    return (FIRST_DAY + timedelta(days=day)).isoformat()


def generate(out: str, days: int, rows_per_day: int, seed: int) -> list[str]:
    """Write ``out``/{day}.csv and the true probabilities in ``out``/truth/{day}.csv; returns the logs."""
    logs = []
    for day in range(days):
        table, probability_R = _one_day(day, rows_per_day, seed)
        truth = pa.table({"row": np.arange(rows_per_day), "probability": np.round(probability_R, 6)})
        _write(storage.join(out, "truth", f"{day_name(day)}.csv"), truth)
        logs.append(storage.join(out, f"{day_name(day)}.csv"))
        _write(logs[-1], table)
    return logs


def generate_once(out: str, days: int, rows_per_day: int, seed: int) -> dict[str, list[str]]:
    """Paths of the logs by day; files of an earlier call with the same arguments are kept, others are deleted."""
    wanted = {"version": VERSION, "rows_per_day": rows_per_day, "seed": seed, "days": days}
    logs = {day_name(day): [storage.join(out, f"{day_name(day)}.csv")] for day in range(days)}
    marker = storage.join(out, "generated.json")
    there = storage.exists(marker) and storage.read_bytes(marker) == storage.json_bytes(wanted)
    if not there or not all(storage.exists(path) for paths in logs.values() for path in paths):
        storage.delete(marker)
        for name in storage.list_folder(out):
            if name.endswith(".csv") and name.removesuffix(".csv") not in logs:
                storage.delete(storage.join(out, name))
                storage.delete(storage.join(out, "truth", name))
        generate(out, days, rows_per_day, seed)
        storage.write_json(marker, wanted)
    return logs


def _write(uri: str, table: pa.Table) -> None:
    with storage.writer(uri) as file:
        file.write((",".join(table.column_names) + "\n").encode())
        options = pacsv.WriteOptions(include_header=False, quoting_style="none")
        pacsv.write_csv(table, pa.PythonFile(file, mode="w"), options)


def _one_day(day: int, rows: int, seed: int) -> tuple[pa.Table, F64]:
    """The log of a day and the probability [R] of each click."""

    def draw(what: str) -> F64:
        return _uniforms(seed, f"{day}/{what}", np.arange(rows))

    fields = _ids(rows)
    midnight = int(datetime.fromisoformat(day_name(day)).replace(tzinfo=UTC).timestamp())
    seconds_R = np.sort((draw("time") * 86_400).astype(np.int64))
    hour_R = seconds_R // 3600
    logit_R = BIAS + 0.2 * _normals(seed, "hour", hour_R)
    columns: dict[str, pa.Array] = {TIME: pa.array(midnight + seconds_R)}
    total, squares = np.zeros((rows, len(RANK_SCALES))), np.zeros(rows)
    ids: dict[str, I64] = {}
    for name, field in fields.items():
        if name == "tags":
            continue
        ids[name] = _category_of(seed, ids["item"], field) if name == "category" else _zipf_ids(draw, field, day)
        present_R = draw(f"{name} missing") >= (0.03 if name == "region" else 0)
        columns[name] = pc.if_else(pa.array(present_R), _texts(ids[name], field), "")
        logit_R += present_R * field.weight * _normals(seed, name, ids[name])
        factors = present_R[:, None] * _factors(seed, field, ids[name])
        total += factors
        squares += (factors**2).sum(axis=1)
    age_R = _days_since(ids["item"], fields["item"])
    columns["tags"], tag_weight_R = _tags(seed, draw, ids["item"], age_R, fields["tags"])
    price_R = np.round(1 + 999 * draw("price") ** 3, 2)
    priced_R = draw("price missing") >= 0.04
    columns["price"] = pc.if_else(pa.array(priced_R), pa.array(price_R).cast(pa.string()), "")
    logit_R += tag_weight_R + priced_R * 0.15 * (np.log1p(price_R) - 4.7)
    logit_R += (total**2).sum(axis=1) - squares
    probability_R = 1 / (1 + np.exp(-logit_R))
    columns[LABEL] = pa.array((draw("click") < probability_R).astype(np.int8))
    return pa.table(columns), probability_R


def _zipf_ids(draw: Callable[[str], F64], field: _Ids, day: int) -> I64:
    """Ids [R], drawn by Zipf's law from the first day's, with a few of those added since and a few of today's."""
    odds = np.cumsum(_zipf_odds(field))
    ids: I64 = np.searchsorted(odds, draw(field.name) * odds[-1]).astype(np.int64)
    if not field.daily:
        return ids
    coin_R, pick_R = draw(f"{field.name} age"), draw(f"{field.name} new")
    today = field.first + day * field.daily
    ids = np.where(coin_R < NEW_SHARE, today + (pick_R * field.daily).astype(np.int64), ids)
    older = (coin_R >= NEW_SHARE) & (coin_R < 2 * NEW_SHARE) & (day > 0)
    return np.where(older, field.first + (pick_R * day * field.daily).astype(np.int64), ids)


def _zipf_odds(field: _Ids) -> F64:
    """Traffic of each first id, up to a factor."""
    odds: F64 = 1 / (np.arange(field.first) + field.first * 0.05 + 1)
    return odds


def _days_since(ids_R: I64, field: _Ids) -> I64:
    """Days [R] from the first one to the one that brought an id; 0 for those that were there from the start."""
    days: I64 = np.maximum((ids_R - field.first) // field.daily + 1, 0)
    return days


def _category_of(seed: int, item_R: I64, field: _Ids) -> I64:
    found: I64 = (_uniforms(seed, "category of item", item_R) * field.first).astype(np.int64)
    return found


def _tags(seed: int, draw: Callable[[str], F64], item_R: I64, age_R: I64, field: _Ids) -> tuple[pa.Array, F64]:
    """Texts and mean weights [R] of an item's one to three tags; some records list none."""
    count_R = 1 + (_uniforms(seed, "tags of item", item_R) * 3).astype(np.int64)
    count_R[draw("tags missing") < 0.05] = 0
    texts, weight_R = [], np.zeros(len(item_R))
    for place in range(3):
        listed_R = place < count_R
        tag_R = (_uniforms(seed, f"tag {place} of item", item_R) * (field.first + age_R * field.daily)).astype(np.int64)
        share_R = listed_R / np.maximum(count_R, 1)
        weight_R += share_R * field.weight * _normals(seed, "tags", tag_R)
        text_R = pc.binary_join_element_wise("|" if place else "", _texts(tag_R, field), "")
        texts.append(pc.if_else(pa.array(listed_R), text_R, ""))
    return pc.binary_join_element_wise(*texts, ""), weight_R


def _texts(ids_R: I64, field: _Ids) -> pa.Array:
    return pc.binary_join_element_wise(field.letter, pa.array(ids_R).cast(pa.string()), "")


def _factors(seed: int, field: _Ids, ids_R: I64) -> F64:
    """z [R, rank] of ids, each factor of mean 0 and variance 1 over the traffic, times its scale."""
    columns = []
    odds = _zipf_odds(field)
    for k, scale in enumerate(RANK_SCALES):
        usual = _normals(seed, f"{field.name} factor {k}", np.arange(field.first))
        mean = np.average(usual, weights=odds)
        deviation = np.average((usual - mean) ** 2, weights=odds) ** 0.5
        columns.append(scale * field.pair * (_normals(seed, f"{field.name} factor {k}", ids_R) - mean) / deviation)
    return np.stack(columns, axis=1)


def _normals(seed: int, what: str, ids_R: I64) -> F64:
    """Draws [R] of mean 0 and variance 1, sums of four uniforms: no library decides a digit of them."""
    return sum(_uniforms(seed, f"{what} {part}", ids_R) - 0.5 for part in range(4)) * 3**0.5  # type: ignore[return-value]


def _uniforms(seed: int, what: str, counters_R: I64) -> F64:
    """Draws [R] in [0, 1), a function of (seed, what, counter)."""
    stream = hash_text(pa.array([what])).view(np.uint64)[0]
    draws: F64 = _hash_uniforms(np.uint64(seed) ^ stream, counters_R)
    return draws


@njit(nogil=True, cache=True)
def _hash_uniforms(base: Any, counters: Array) -> Array:
    out = np.empty(len(counters), np.float64)
    for i in range(len(counters)):
        out[i] = (splitmix64(splitmix64(base) ^ uint64(counters[i])) >> uint64(11)) * 2.0**-53
    return out

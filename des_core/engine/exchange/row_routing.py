"""The exchange ``rows``: which unique rows travel to which home, and how a home finds them again.

An owner knows the ids of every home's samples, so no home ever asks. To a home it sends the rows that the
home's samples read, each once, and one message of 32-bit integers about its own fields' lookups there:

    per owned field: -1 if every sample has exactly one lookup with x = 1 (or 0: not admitted), else their number
    per lookup: the row's place among those sent, -1 for one that contributes zero
    per lookup of a field that is not -1: its sample at home, and the bits of x

Lookups lie field by field in sample order. Dims: N homes, O fields owned, L lookups, U unique rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class RowRouting:
    """What one owner sends of one batch."""

    rows: Array
    """Places in the owner's unique rows, int64, home by home."""
    rows_N: Array
    message: Array
    """int32, home by home."""
    message_N: Array


def route_rows(
    inverse_L: Array, sample_L: Array, piece_L: Array, x_L: Array, edges: list[int], owned: int
) -> RowRouting:
    """The routing of a batch whose homes begin at ``edges`` (and its end), for an owner of ``owned`` fields."""
    unique = int(inverse_L.max()) + 1 if len(inverse_L) else 0
    rows, rows_N, message, message_N = _route(
        inverse_L, sample_L, piece_L, x_L, np.asarray(edges, np.int64), owned, unique
    )
    return RowRouting(rows, rows_N, message, message_N)


@njit(nogil=True, cache=True)
def _route(
    inverse_L: Array, sample_L: Array, piece_L: Array, x_L: Array, edges: Array, owned: int, unique: int
) -> tuple[Array, Array, Array, Array]:
    homes = len(edges) - 1
    home_of = np.empty(edges[-1], np.int64)
    for home in range(homes):
        home_of[edges[home] : edges[home + 1]] = home
    counts = np.zeros((homes, owned), np.int64)
    plain = np.ones((homes, owned), np.bool_)
    for i in range(len(inverse_L)):
        home, piece = home_of[sample_L[i]], piece_L[i]
        if sample_L[i] - edges[home] != counts[home, piece] or (x_L[i] != 1 and x_L[i] != 0):
            plain[home, piece] = False
        counts[home, piece] += 1
    rows_N, message_N = np.zeros(homes, np.int64), np.zeros(homes, np.int64)
    explicit = np.zeros(homes, np.int64)
    for home in range(homes):
        lookups = 0
        for piece in range(owned):
            plain[home, piece] &= counts[home, piece] == edges[home + 1] - edges[home]
            lookups += counts[home, piece]
            explicit[home] += 0 if plain[home, piece] else counts[home, piece]
        message_N[home] = owned + lookups + 2 * explicit[home] if lookups else 0
    starts = np.cumsum(message_N) - message_N
    message = np.empty(message_N.sum(), np.int32)
    at = starts + owned
    sample_at = starts + message_N - 2 * explicit
    for home in range(homes):
        if message_N[home]:
            for piece in range(owned):
                message[starts[home] + piece] = -1 if plain[home, piece] else counts[home, piece]
    place = np.full((homes, unique), -1, np.int32)
    order = np.empty((homes, min(unique, len(inverse_L))), np.int64)
    x_bits = x_L.astype(np.float32).view(np.int32)
    for i in range(len(inverse_L)):
        home, row = home_of[sample_L[i]], inverse_L[i]
        if x_L[i] != 0 and place[home, row] < 0:
            place[home, row] = rows_N[home]
            order[home, rows_N[home]] = row
            rows_N[home] += 1
        message[at[home]] = place[home, row] if x_L[i] != 0 else -1
        at[home] += 1
        if not plain[home, piece_L[i]]:
            message[sample_at[home]] = sample_L[i] - edges[home]
            message[sample_at[home] + explicit[home]] = x_bits[i]
            sample_at[home] += 1
    rows = np.empty(rows_N.sum(), np.int64)
    used = 0
    for home in range(homes):
        rows[used : used + rows_N[home]] = order[home, : rows_N[home]]
        used += rows_N[home]
    return rows, rows_N, message, message_N


def arrived(messages: list[Array], rows_N: Array, owned: list[list[int]], samples: int) -> tuple[Array, ...]:
    """Lookups of ``samples`` home samples, from the owners' messages: inverse, sample, field and x, each [L].

    Args:
        rows_N: rows that each owner sent; they lie one owner after another.
        owned: numbers of the fields that each owner owns pieces of.
    """
    parts = []
    offsets = np.cumsum(rows_N) - rows_N
    for message, offset, fields in zip(messages, offsets, owned, strict=True):
        if len(message):
            parts.append(_read(message, offset, np.asarray(fields, np.int64), samples))
    if not parts:
        return (*(np.empty(0, np.int64) for _ in range(3)), np.empty(0, np.float32))
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


@njit(nogil=True, cache=True)
def _read(message: Array, offset: int, fields: Array, samples: int) -> tuple[Array, Array, Array, Array]:
    owned = len(fields)
    lookups, explicit = 0, 0
    for piece in range(owned):
        lookups += samples if message[piece] < 0 else message[piece]
        explicit += max(message[piece], 0)
    inverse, sample, field = np.empty(lookups, np.int64), np.empty(lookups, np.int64), np.empty(lookups, np.int64)
    x = np.ones(lookups, np.float32)
    x_bits = message[owned + lookups + explicit :].view(np.float32)
    at, seen, used = 0, 0, 0
    for piece in range(owned):
        for i in range(samples if message[piece] < 0 else message[piece]):
            place = message[owned + at]
            at += 1
            seen += message[piece] >= 0
            if place >= 0:
                inverse[used], field[used] = offset + place, fields[piece]
                sample[used] = i if message[piece] < 0 else message[owned + lookups + seen - 1]
                x[used] = 1 if message[piece] < 0 else x_bits[seen - 1]
                used += 1
    return inverse[:used], sample[:used], field[:used], x[:used]

"""id -> slot: open addressing over one flat array, grown by doubling.

An entry is 64 bits: the id's high half as a tag, and slot + 1; zero is empty. Linear probing starts at
the id's low bits; a tag that matches is confirmed against the full id kept in slot order, so a slot
costs 8 bytes here at any load and no id is a reserved marker. Capacity is a power of two and at most
0.6 full. All of it runs outside the interpreter's lock.

Dims: C entries, S slots in use, Q ids asked for, L lookups, U unique ids.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, uint64

Array = np.ndarray[Any, np.dtype[Any]]

MAX_LOAD = 0.6


def capacity_for(slots: int) -> int:
    """The least power of two that holds ``slots`` at the maximum load."""
    return max(1024, 1 << int(np.ceil(np.log2(max(slots, 1) / MAX_LOAD))))


@njit(nogil=True, cache=True)
def find(entries_C: Array, ids_S: Array, query_Q: Array) -> Array:
    """Slots [Q] of ids, -1 where unseen."""
    mask = uint64(len(entries_C) - 1)
    slots_Q = np.empty(len(query_Q), np.int64)
    for i in range(len(query_Q)):
        wanted = uint64(query_Q[i])
        at = wanted & mask
        slots_Q[i] = -1
        while entries_C[at] != 0:
            if entries_C[at] >> uint64(32) == wanted >> uint64(32):
                slot = np.int64(entries_C[at] & uint64(0xFFFFFFFF)) - 1
                if ids_S[slot] == query_Q[i]:
                    slots_Q[i] = slot
                    break
            at = (at + uint64(1)) & mask
    return slots_Q


@njit(nogil=True, cache=True)
def place(entries_C: Array, ids_S: Array, first: int, last: int) -> None:
    """Enter slots [first, last), whose ids stand in ``ids_S`` and are not entered yet."""
    mask = uint64(len(entries_C) - 1)
    for slot in range(first, last):
        wanted = uint64(ids_S[slot])
        at = wanted & mask
        while entries_C[at] != 0:
            at = (at + uint64(1)) & mask
        entries_C[at] = (wanted >> uint64(32)) << uint64(32) | uint64(slot + 1)


@njit(nogil=True, cache=True)
def dedupe(ids_L: Array) -> tuple[Array, Array, Array]:
    """Unique ids [U] in order of first appearance, inverse [L], and first lookup [U] of each."""
    size = 1024
    while size < 2 * len(ids_L):
        size *= 2
    mask = uint64(size - 1)
    seats = np.full(size, -1, np.int32)
    unique = np.empty(len(ids_L), np.int64)
    first = np.empty(len(ids_L), np.int64)
    inverse = np.empty(len(ids_L), np.int64)
    count = 0
    for i in range(len(ids_L)):
        at = uint64(ids_L[i]) & mask
        while seats[at] >= 0 and unique[seats[at]] != ids_L[i]:
            at = (at + uint64(1)) & mask
        if seats[at] < 0:
            seats[at] = count
            unique[count] = ids_L[i]
            first[count] = i
            count += 1
        inverse[i] = seats[at]
    return unique[:count].copy(), inverse, first[:count].copy()

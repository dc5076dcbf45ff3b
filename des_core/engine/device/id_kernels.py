"""Kernels of the id side: keys to ids, ids to slots, new ids made unique, admitted and inserted.

Integers only, and every result is independent of the order in which the hardware runs the programs: a claim of a
place in a hash table decides nothing but the place; which lookup of a new id is the first is a minimum, how many there
are is a sum.

Index entries are as on the CPU (weights/index.py): 64 bits, the id's low half as a tag and slot + 1, zero is empty.
Lanes that have nothing to do aim at a spare entry behind the table and compare with a value that never stands there,
because a compare-and-swap takes no mask.
Dims: L lookups of the batch, C entries of the index, T places of the batch's own hash table.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 256
NEVER = tl.constexpr(-2)
EMPTY = tl.constexpr(-1)


@triton.jit
def splitmix64(z):
    """The uint64 that follows state ``z``."""
    z = z + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def ids_of_keys(keys_L, piece_L, salts_O, owned_OH, ids_L, mine_L, lookups, BUCKETS: tl.constexpr, BLOCK: tl.constexpr):
    """ids = splitmix64(key ^ salt of its table), and whether this worker owns the id's bucket."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < lookups
    piece = tl.load(piece_L + i, mask=inside, other=0)
    key = tl.load(keys_L + i, mask=inside, other=0).to(tl.uint64, bitcast=True)
    salt = tl.load(salts_O + piece, mask=inside, other=0).to(tl.uint64, bitcast=True)
    mixed = splitmix64(key ^ salt)
    tl.store(ids_L + i, mixed.to(tl.int64, bitcast=True), mask=inside)
    bucket = (mixed >> 56).to(tl.int32)
    tl.store(mine_L + i, tl.load(owned_OH + piece * BUCKETS + bucket, mask=inside, other=0), mask=inside)


@triton.jit
def find(ids_L, wanted_L, entries_C, ids_S, slots_L, lookups, capacity, BLOCK: tl.constexpr):
    """Slots of ids, -1 where they are unseen or not wanted."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    active = (i < lookups) & (tl.load(wanted_L + i, mask=i < lookups, other=0) != 0)
    id_ = tl.load(ids_L + i, mask=active, other=0)
    tag = id_ & 0xFFFFFFFF
    at = tag & (capacity - 1)
    slots = tl.full([BLOCK], -1, tl.int64)
    while tl.sum(active.to(tl.int32)) > 0:
        entry = tl.load(entries_C + at, mask=active, other=0)
        empty = entry == 0
        slot = (entry & 0xFFFFFFFF) - 1
        near = active & ~empty & (((entry >> 32) & 0xFFFFFFFF) == tag)
        same = near & (tl.load(ids_S + slot, mask=near, other=0) == id_)
        slots = tl.where(same, slot, slots)
        active = active & ~empty & ~same
        at = (at + 1) & (capacity - 1)
    tl.store(slots_L + i, slots, mask=i < lookups)


@triton.jit
def claim_new(ids_L, wanted_L, slots_L, seats_T, seat_L, first_T, count_T, lookups, places, BLOCK: tl.constexpr):
    """Give equal unseen ids one seat: the lookup that claimed it, the first lookup of the id, and their number."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < lookups
    wanted = tl.load(wanted_L + i, mask=inside, other=0) != 0
    active = inside & wanted & (tl.load(slots_L + i, mask=inside, other=0) < 0)
    new = active
    id_ = tl.load(ids_L + i, mask=active, other=0)
    # Bits that choose the index's entry are the tag's low ones: others scatter ids that collide there.
    at = ((id_ >> 17) ^ id_) & (places - 1)
    seat = tl.zeros([BLOCK], tl.int64)
    while tl.sum(active.to(tl.int32)) > 0:
        place = seats_T + tl.where(active, at, places)
        before = tl.atomic_cas(place, tl.where(active, EMPTY, NEVER).to(tl.int32), i.to(tl.int32))
        holder = tl.load(ids_L + before, mask=active & (before >= 0), other=0)
        done = active & ((before == EMPTY) | (holder == id_))
        seat = tl.where(done, at, seat)
        active = active & ~done
        at = (at + 1) & (places - 1)
    tl.store(seat_L + i, tl.where(new, seat, -1).to(tl.int32), mask=inside)
    tl.atomic_min(first_T + seat, i.to(tl.int32), mask=new)
    tl.atomic_add(count_T + seat, tl.full([BLOCK], 1, tl.int32), mask=new)


@triton.jit
def admit_by_coin(ids_L, seat_L, first_T, admitted_L, lookups, key, probability, BLOCK: tl.constexpr):
    """1 for the first lookup of each new id whose coin of this step falls for it, else 0."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < lookups
    seat = tl.load(seat_L + i, mask=inside, other=-1)
    first = inside & (seat >= 0) & (tl.load(first_T + seat, mask=inside & (seat >= 0), other=-1) == i)
    id_ = tl.load(ids_L + i, mask=first, other=0).to(tl.uint64, bitcast=True)
    draw = splitmix64(id_ ^ tl.load(key).to(tl.uint64, bitcast=True)) >> 11
    heads = draw.to(tl.float64) * 1.1102230246251565e-16 < tl.load(probability)
    tl.store(admitted_L + i, (first & heads).to(tl.int32), mask=inside)


@triton.jit
def admit_by_count(
    seat_L, first_T, count_T, waiting_L, counts_S, admitted_L, before_L, lookups, least, BLOCK: tl.constexpr
):
    """1 for the first lookup of each new id that was looked up ``least`` times by now, else 0; and how often before."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < lookups
    seat = tl.load(seat_L + i, mask=inside, other=-1)
    first = inside & (seat >= 0) & (tl.load(first_T + seat, mask=inside & (seat >= 0), other=-1) == i)
    slot = tl.load(waiting_L + i, mask=first, other=-1)
    before = tl.load(counts_S + slot, mask=first & (slot >= 0), other=0).to(tl.int64) & 0xFFFFFFFF
    now = before + tl.load(count_T + seat, mask=first, other=0)
    tl.store(before_L + i, before, mask=inside)
    tl.store(admitted_L + i, (first & (now >= least)).to(tl.int32), mask=inside)


@triton.jit
def insert(
    ids_L, piece_L, table_O, chosen_L, rank_L, before_L, seat_L, used, entries_C, ids_S, tables_S, counts_S, last_S,
    slot_T, lookups, capacity, step, HAS_BEFORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Take the next slots for the chosen lookups, in their order, and enter them into the index."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    active = (i < lookups) & (tl.load(chosen_L + i, mask=i < lookups, other=0) != 0)
    id_ = tl.load(ids_L + i, mask=active, other=0)
    slot = tl.load(used) + tl.load(rank_L + i, mask=active, other=1).to(tl.int64) - 1
    table = tl.load(table_O + tl.load(piece_L + i, mask=active, other=0), mask=active, other=0)
    tl.store(ids_S + slot, id_, mask=active)
    tl.store(tables_S + slot, table, mask=active)
    before = tl.load(before_L + i, mask=active, other=0) if HAS_BEFORE else tl.zeros([BLOCK], tl.int64)
    tl.store(counts_S + slot, before.to(tl.int32), mask=active)
    tl.store(last_S + slot, tl.zeros([BLOCK], tl.int32) + tl.load(step), mask=active)
    tl.store(slot_T + tl.load(seat_L + i, mask=active, other=0), slot, mask=active)
    tag = id_ & 0xFFFFFFFF
    entry = (tag << 32) | (slot + 1)
    at = tag & (capacity - 1)
    while tl.sum(active.to(tl.int32)) > 0:
        place = entries_C + tl.where(active, at, capacity)
        empty = tl.where(active, 0, NEVER).to(tl.int64)
        before_entry = tl.atomic_cas(place, empty, entry)
        active = active & (before_entry != 0)
        at = (at + 1) & (capacity - 1)


@triton.jit
def enter(ids_S, entries_C, start, stop, capacity, BLOCK: tl.constexpr):
    """Enter slots [start, stop) into an index that has none of them."""
    slot = start + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    active = slot < stop
    id_ = tl.load(ids_S + slot, mask=active, other=0)
    tag = id_ & 0xFFFFFFFF
    entry = (tag << 32) | (slot + 1)
    at = tag & (capacity - 1)
    while tl.sum(active.to(tl.int32)) > 0:
        place = entries_C + tl.where(active, at, capacity)
        before = tl.atomic_cas(place, tl.where(active, 0, NEVER).to(tl.int64), entry)
        active = active & (before != 0)
        at = (at + 1) & (capacity - 1)


@triton.jit
def slots_of_new(seat_L, slot_T, slots_L, lookups, BLOCK: tl.constexpr):
    """The slots of lookups whose id was new; -1 where it was not admitted."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seat = tl.load(seat_L + i, mask=i < lookups, other=-1)
    new = (i < lookups) & (seat >= 0)
    tl.store(slots_L + i, tl.load(slot_T + seat, mask=new, other=-1), mask=new)


@triton.jit
def wait_longer(
    chosen_L, admitted_L, waiting_L, seat_L, count_T, before_L, counts_S, last_S, lookups, step, BLOCK: tl.constexpr
):
    """Count the lookups of ids that still wait; an admitted id waits no longer: its count is zero."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < lookups
    slot = tl.load(waiting_L + i, mask=inside, other=-1)
    chosen = inside & (tl.load(chosen_L + i, mask=inside, other=0) != 0) & (slot >= 0)
    admitted = tl.load(admitted_L + i, mask=inside, other=0) != 0
    seat = tl.load(seat_L + i, mask=chosen, other=0)
    now = tl.load(before_L + i, mask=chosen, other=0) + tl.load(count_T + seat, mask=chosen, other=0)
    now = tl.where(admitted, 0, tl.minimum(now, 0xFFFFFFFF))
    tl.store(counts_S + slot, now.to(tl.int32), mask=chosen)
    tl.store(last_S + slot, tl.zeros([BLOCK], tl.int32) + tl.load(step), mask=chosen)


@triton.jit
def first_rows(
    ids_S, bases, states, used, new, seed_key, scale, K: tl.constexpr, Z: tl.constexpr, STRIDE: tl.constexpr,
    STATE_STRIDE: tl.constexpr, SHIFT: tl.constexpr, WIDE: tl.constexpr, DTYPE: tl.constexpr, ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """First values of slots [used, used + new): w = 0, factors drawn by counter from (seed, id), state zero."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(used) + at
    active = at < tl.load(new)
    column = tl.arange(0, WIDE)
    id_ = tl.load(ids_S + slot, mask=active, other=0).to(tl.uint64, bitcast=True)
    base = splitmix64(id_ ^ tl.load(seed_key).to(tl.uint64, bitcast=True))
    factor = tl.maximum(column - 1, 0).to(tl.uint64)
    draw = splitmix64(base[:, None] + factor[None, :]) >> 11
    value = (draw.to(tl.float64) * 2.220446049250313e-16 - 1.0) * tl.load(scale)
    value = tl.where((column >= 1) & (column < K), value, 0.0)
    inside = slot & ((1 << SHIFT) - 1)
    chunk = tl.load(bases + (slot >> SHIFT), mask=active, other=0).to(tl.pointer_type(ROW))
    place = chunk[:, None] + (inside * STRIDE)[:, None] + column[None, :]
    tl.store(place, value.to(DTYPE).to(ROW), mask=active[:, None] & (column < K)[None, :])
    chunk = tl.load(states + (slot >> SHIFT), mask=active, other=0).to(tl.pointer_type(DTYPE))
    place = chunk[:, None] + (inside * STATE_STRIDE)[:, None] + column[None, :]
    tl.store(place, tl.zeros([BLOCK, WIDE], DTYPE), mask=active[:, None] & (column < Z)[None, :])

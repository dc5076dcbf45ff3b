"""Kernels of the id side: keys to ids, ids to slots, new ids made unique, admitted and inserted.

Integers only, and every result is independent of the order in which the hardware runs the programs: a claim of a
place in a hash table decides nothing but the place; which lookup of a new id is the first is a maximum, how many there
are is a sum.

Index entries are 64 bits as on the CPU (weights/index.py), the id's low half as a tag and slot + 1, zero is empty; but
a search begins where all bits of an id say, so that ids with equal low halves do not meet. A compare-and-swap takes no
mask: lanes that claim nothing aim at spare entries behind the table, each at its own, and compare with a value that
never stands there.

The batch's own hash table is five arrays of T in one, filled with -1: the lookup that claimed a place (its seat),
``lookups`` less the first lookup of its id, the number of its lookups less 1, the slot that it was given, and its
slot among the ids that wait.

``piece_L`` is read only where lookups are not ``PLAIN``: one lookup for each field and sample, field by field.
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
def home_of(id_, size):
    """The place in a table of ``size``, a power of two, at which the search for an id begins."""
    return splitmix64(id_.to(tl.uint64, bitcast=True)).to(tl.int64, bitcast=True) & (size - 1)


@triton.jit
def piece_of(i, piece_L, inside, samples, PLAIN: tl.constexpr):
    """The place of a lookup's field among those owned here."""
    return (i // samples).to(tl.int64) if PLAIN else tl.load(piece_L + i, mask=inside, other=0).to(tl.int64)


@triton.jit
def ids_of_keys(
    keys_L, piece_L, salts_O, owned_OH, ids_L, mine_L, lookups, samples,
    BUCKETS: tl.constexpr, PLAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ids = splitmix64(key ^ salt of its table), and whether this worker owns the id's bucket; never of a piece -1."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < lookups
    piece = piece_of(i, piece_L, inside, samples, PLAIN)
    real = inside & (piece >= 0)
    key = tl.load(keys_L + i, mask=inside, other=0).to(tl.uint64, bitcast=True)
    salt = tl.load(salts_O + piece, mask=real, other=0).to(tl.uint64, bitcast=True)
    mixed = splitmix64(key ^ salt)
    tl.store(ids_L + i, mixed.to(tl.int64, bitcast=True), mask=inside)
    bucket = (mixed >> 56).to(tl.int32)
    tl.store(mine_L + i, tl.load(owned_OH + piece * BUCKETS + bucket, mask=real, other=0), mask=inside)


@triton.jit
def find(ids_L, wanted_L, entries_C, ids_S, slots_L, lookups, capacity, BLOCK: tl.constexpr):
    """Slots of ids, -1 where they are unseen or not wanted."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    active = (i < lookups) & (tl.load(wanted_L + i, mask=i < lookups, other=0) != 0)
    id_ = tl.load(ids_L + i, mask=active, other=0)
    tag = id_ & 0xFFFFFFFF
    at = home_of(id_, capacity)
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
    tl.store(slots_L + i, slots.to(tl.int32), mask=i < lookups)


@triton.jit
def claim_new(ids_L, wanted_L, slots_L, batch_5T, seat_L, lookups, places, BLOCK: tl.constexpr):
    """Give equal unseen ids one seat: the lookup that claimed it, the first lookup of the id, and their number."""
    lane = tl.arange(0, BLOCK)
    i = tl.program_id(0).to(tl.int64) * BLOCK + lane
    inside = i < lookups
    wanted = tl.load(wanted_L + i, mask=inside, other=0) != 0
    active = inside & wanted & (tl.load(slots_L + i, mask=inside, other=0) < 0)
    new = active
    id_ = tl.load(ids_L + i, mask=active, other=0)
    at = home_of(id_, places)
    seat = tl.zeros([BLOCK], tl.int64)
    while tl.sum(active.to(tl.int32)) > 0:
        # A read is cheaper than a swap, and what is taken stays taken.
        before = tl.load(batch_5T + at, mask=active, other=NEVER)
        free = active & (before == EMPTY)
        place = batch_5T + tl.where(free, at, 5 * places + lane)
        swapped = tl.atomic_cas(place, tl.where(free, EMPTY, NEVER).to(tl.int32), i.to(tl.int32))
        before = tl.where(free, swapped, before)
        holder = tl.load(ids_L + before, mask=active & (before >= 0), other=0)
        done = active & ((before == EMPTY) | (holder == id_))
        seat = tl.where(done, at, seat)
        active = active & ~done
        at = (at + 1) & (places - 1)
    tl.store(seat_L + i, tl.where(new, seat, -1).to(tl.int32), mask=inside)
    tl.atomic_max(batch_5T + places + seat, (lookups - i).to(tl.int32), mask=new)
    tl.atomic_add(batch_5T + 2 * places + seat, tl.full([BLOCK], 1, tl.int32), mask=new)


@triton.jit
def is_first(i, seat, inside, batch_5T, lookups, places):
    """Whether lookups are the first ones of a new id."""
    new = inside & (seat >= 0)
    return new & (lookups - tl.load(batch_5T + places + seat, mask=new, other=0) == i)


@triton.jit
def admit_by_coin(ids_L, seat_L, batch_5T, admitted_L, lookups, places, control, probability, BLOCK: tl.constexpr):
    """1 for the first lookup of each new id whose coin of this step falls for it, else 0."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < lookups
    seat = tl.load(seat_L + i, mask=inside, other=-1)
    first = is_first(i, seat, inside, batch_5T, lookups, places)
    id_ = tl.load(ids_L + i, mask=first, other=0).to(tl.uint64, bitcast=True)
    draw = splitmix64(id_ ^ tl.load(control + 1).to(tl.uint64, bitcast=True)) >> 11
    heads = draw.to(tl.float64) * 1.1102230246251565e-16 < tl.load(probability)
    tl.store(admitted_L + i, (first & heads).to(tl.int32), mask=inside)


@triton.jit
def admit_by_count(
    seat_L, batch_5T, waiting_L, counts_S, admitted_L, before_L, enters_L, lookups, places, least, BLOCK: tl.constexpr
):
    """Of the first lookups of new ids: 1 where it was looked up ``least`` times by now, else 0; how often before; and
    whether it begins to wait now."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < lookups
    seat = tl.load(seat_L + i, mask=inside, other=-1)
    first = is_first(i, seat, inside, batch_5T, lookups, places)
    slot = tl.load(waiting_L + i, mask=first, other=-1)
    before = tl.load(counts_S + slot, mask=first & (slot >= 0), other=0).to(tl.int64) & 0xFFFFFFFF
    now = before + tl.load(batch_5T + 2 * places + seat, mask=first, other=0) + 1
    tl.store(before_L + i, before, mask=inside)
    tl.store(admitted_L + i, (first & (now >= least)).to(tl.int32), mask=inside)
    tl.store(enters_L + i, (first & (now < least) & (slot < 0)).to(tl.int32), mask=inside)


@triton.jit
def insert(
    ids_L, piece_L, table_O, chosen_L, rank_L, before_L, seat_L, used, entries_C, ids_S, tables_S, counts_S, last_S,
    batch_5T, lookups, samples, capacity, places, control, bases, states, seed_key, scale,
    HAS_BEFORE: tl.constexpr, PLAIN: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, Z: tl.constexpr,
    STRIDE: tl.constexpr, STATE_STRIDE: tl.constexpr, SHIFT: tl.constexpr, DTYPE: tl.constexpr, ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Take the next slots for the chosen lookups, in their order, and enter them into the index; with ``ROWS`` write
    the slots' first values: w = 0, factors drawn by counter from (seed, id), state zero."""
    lane = tl.arange(0, BLOCK)
    i = tl.program_id(0).to(tl.int64) * BLOCK + lane
    active = (i < lookups) & (tl.load(chosen_L + i, mask=i < lookups, other=0) != 0)
    if tl.sum(active.to(tl.int32)) > 0:
        id_ = tl.load(ids_L + i, mask=active, other=0)
        slot = tl.load(used) + tl.load(rank_L + i, mask=active, other=1).to(tl.int64) - 1
        table = tl.load(table_O + piece_of(i, piece_L, active, samples, PLAIN), mask=active, other=0)
        tl.store(ids_S + slot, id_, mask=active)
        tl.store(tables_S + slot, table.to(tl.int16), mask=active)
        before = tl.load(before_L + i, mask=active, other=0) if HAS_BEFORE else tl.zeros([BLOCK], tl.int64)
        tl.store(counts_S + slot, before.to(tl.int32), mask=active)
        tl.store(last_S + slot, tl.zeros([BLOCK], tl.int32) + tl.load(control).to(tl.int32), mask=active)
        seat = tl.load(seat_L + i, mask=active, other=0)
        tl.store(batch_5T + (3 if ROWS else 4) * places + seat, slot.to(tl.int32), mask=active)
        if ROWS:
            own = slot & ((1 << SHIFT) - 1)
            base = splitmix64(id_.to(tl.uint64, bitcast=True) ^ tl.load(seed_key).to(tl.uint64, bitcast=True))
            record = tl.load(bases + (slot >> SHIFT), mask=active, other=0).to(tl.pointer_type(ROW)) + own * STRIDE
            tl.store(record, tl.zeros([BLOCK], DTYPE).to(ROW), mask=active)
            for factor in range(K - 1):
                draw = splitmix64(base + (tl.zeros([BLOCK], tl.int64) + factor).to(tl.uint64)) >> 11
                value = (draw.to(tl.float64) * 2.220446049250313e-16 - 1.0) * tl.load(scale)
                tl.store(record + 1 + factor, value.to(DTYPE).to(ROW), mask=active)
            state = tl.load(states + (slot >> SHIFT), mask=active, other=0).to(tl.pointer_type(DTYPE))
            for number in range(Z):
                tl.store(state + own * STATE_STRIDE + number, tl.zeros([BLOCK], DTYPE), mask=active)
        enter_all(id_, slot, active, lane, entries_C, capacity, BLOCK)


@triton.jit
def enter_all(id_, slot, active, lane, entries_C, capacity, BLOCK: tl.constexpr):
    """Enter slots into the index, which has none of their ids."""
    entry = ((id_ & 0xFFFFFFFF) << 32) | (slot + 1)
    at = home_of(id_, capacity)
    while tl.sum(active.to(tl.int32)) > 0:
        free = active & (tl.load(entries_C + at, mask=active, other=NEVER) == 0)
        place = entries_C + tl.where(free, at, capacity + lane)
        before = tl.atomic_cas(place, tl.where(free, 0, NEVER).to(tl.int64), entry)
        active = active & ~(free & (before == 0))
        at = (at + 1) & (capacity - 1)


@triton.jit
def enter(ids_S, entries_C, start, stop, capacity, BLOCK: tl.constexpr):
    """Enter slots [start, stop) into an index that has none of them."""
    lane = tl.arange(0, BLOCK)
    slot = start + tl.program_id(0).to(tl.int64) * BLOCK + lane
    active = slot < stop
    enter_all(tl.load(ids_S + slot, mask=active, other=0), slot, active, lane, entries_C, capacity, BLOCK)


@triton.jit
def slots_of_new(
    seat_L, batch_5T, rank_L, used, born, slots_L, lookups, places, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """The slots of lookups whose id was new, -1 where it was not admitted; and how many are in use from now on."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seat = tl.load(seat_L + i, mask=i < lookups, other=-1)
    new = (i < lookups) & (seat >= 0)
    if ROWS:
        tl.store(slots_L + i, tl.load(batch_5T + 3 * places + seat, mask=new, other=-1), mask=new)
    if tl.program_id(0) == 0:
        many = tl.load(rank_L + lookups - 1).to(tl.int64)
        tl.store(used, tl.load(used) + many)
        if ROWS:
            tl.store(born, tl.load(born) + many)


@triton.jit
def wait_longer(
    admitted_L, waiting_L, seat_L, batch_5T, before_L, counts_S, last_S, lookups, places, control,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the lookups of ids that still wait; an admitted id waits no longer: its count is zero."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < lookups
    seat = tl.load(seat_L + i, mask=inside, other=-1)
    first = is_first(i, seat, inside, batch_5T, lookups, places)
    slot = tl.load(waiting_L + i, mask=first, other=-1)
    slot = tl.where(slot < 0, tl.load(batch_5T + 4 * places + seat, mask=first & (slot < 0), other=-1), slot)
    chosen = first & (slot >= 0)
    admitted = tl.load(admitted_L + i, mask=inside, other=0) != 0
    now = tl.load(before_L + i, mask=chosen, other=0) + 1
    now += tl.load(batch_5T + 2 * places + seat, mask=chosen, other=0)
    now = tl.where(admitted, 0, tl.minimum(now, 0xFFFFFFFF))
    tl.store(counts_S + slot, now.to(tl.int32), mask=chosen)
    tl.store(last_S + slot, tl.zeros([BLOCK], tl.int32) + tl.load(control).to(tl.int32), mask=chosen)

"""Kernels of the rows: pooling forward, and gradients with the update of rows and state.

Sums have a fixed order and no float is added atomically, so two runs on one device have the same bits. Forward, a
sample's lookups are added field by field in their order. Backward, the lookups sorted by slot are cut at each new slot
and at every multiple of ``PIECE``: a piece is summed in order by one program, and a row's pieces are added in order
before its rule is applied, so that a row with a million lookups is spread over the device like all others.

Dims: B samples, O fields, L lookups, U unique rows, P pieces, K numbers per row, k = K - 1 factors, Z numbers of state.
"""

from __future__ import annotations

import triton
import triton.language as tl

from des_core.engine.device.id_kernels import splitmix64

PIECE = 64
SAMPLES = 16
ROWS = 16
SGD, ADAGRAD, ROWWISE_ADAGRAD, ADAM, FTRL = 0, 1, 2, 3, 4


@triton.jit
def records(bases, slot, active, STRIDE: tl.constexpr, SHIFT: tl.constexpr, KIND: tl.constexpr, WHOLE: tl.constexpr):
    """Addresses of the records of slots, whose numbers are of some kind."""
    chunk = tl.load(bases + (slot >> SHIFT), mask=active, other=0).to(tl.pointer_type(KIND))
    if WHOLE:
        # Rows begin at multiples of 16 bytes: without the hint each number would be a load of its own. Their state,
        # which follows a row of any width, does not.
        chunk = tl.multiple_of(chunk, 16)
    return chunk + (slot & ((1 << SHIFT) - 1)) * STRIDE


@triton.jit
def store_rows(place, rows, both, id_, key, column, ROW: tl.constexpr):
    """Write rows; into 16 bits they are rounded up or down by a draw from (key, id, column), right in the mean."""
    if tl.bfloat16 == ROW:
        base = splitmix64(id_.to(tl.uint64, bitcast=True) ^ key.to(tl.uint64, bitcast=True))
        draw = splitmix64(base[:, None] + column[None, :].to(tl.uint64)) >> 48
        bits = (rows.to(tl.uint32, bitcast=True) + draw.to(tl.uint32)) & 0xFFFF0000
        rows = bits.to(tl.float32, bitcast=True)
    tl.store(place, rows.to(ROW), mask=both)


@triton.jit
def _root(x):
    """Square root, correctly rounded; for float32 the plain one is an approximation."""
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit
def pool_forward(
    slots_L, x_L, offsets_OB, bases, summed_BK, vectors_BOk, squares_B, samples, fields,
    K: tl.constexpr, WIDE: tl.constexpr, STRIDE: tl.constexpr, SHIFT: tl.constexpr, DTYPE: tl.constexpr,
    ROW: tl.constexpr, BY_FIELD: tl.constexpr, SQUARES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums [B, K], vectors [B, O, k] and squares [B]: as pool of weights/pooling.py."""
    # Whole vectors of 16 bytes are read, and what is not of the row is dropped.
    WHOLE: tl.constexpr = (K * ROW.primitive_bitwidth + 127) // 128 * 128 // ROW.primitive_bitwidth
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = b < samples
    column = tl.arange(0, WIDE)
    summed = tl.zeros([BLOCK, WIDE], DTYPE)
    squares = tl.zeros([BLOCK], DTYPE)
    for o in range(fields):
        at = tl.load(offsets_OB + o * samples + b, mask=inside, other=0)
        stop = tl.load(offsets_OB + o * samples + b + 1, mask=inside, other=0)
        vector = tl.zeros([BLOCK, WIDE], DTYPE)
        while tl.max(stop - at) > 0:
            slot = tl.load(slots_L + at, mask=at < stop, other=-1).to(tl.int64)
            known = (at < stop) & (slot >= 0)
            x = tl.load(x_L + at, mask=known, other=0)
            record = records(bases, slot, known, STRIDE, SHIFT, ROW, True)
            row = tl.load(record[:, None] + column[None, :], mask=known[:, None] & (column < WHOLE)[None, :], other=0)
            scaled = tl.where((column < K)[None, :], row.to(DTYPE), 0) * x[:, None]
            vector += scaled
            if SQUARES:
                v = tl.where((column >= 1)[None, :], scaled, 0)
                squares += tl.sum(v * v, 1)
            at += 1
        summed += vector
        if BY_FIELD:
            place = vectors_BOk + (b.to(tl.int64) * fields + o)[:, None] * (K - 1) + column[None, :] - 1
            tl.store(place, vector, mask=inside[:, None] & ((column >= 1) & (column < K))[None, :])
    tl.store(
        summed_BK + b.to(tl.int64)[:, None] * K + column[None, :], summed, mask=inside[:, None] & (column < K)[None, :]
    )
    if SQUARES:
        tl.store(squares_B + b, squares, mask=inside)


@triton.jit
def mark(sorted_L, marks_L, lookups, PIECE: tl.constexpr, BLOCK: tl.constexpr):
    """2^32 where a row begins, plus 1 where a piece begins; lookups without a row, all at the end, begin none."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < lookups
    slot = tl.load(sorted_L + i, mask=inside, other=0)
    before = tl.load(sorted_L + i - 1, mask=inside & (i > 0), other=-1)
    known = inside & (slot < 0x7FFFFFFF)
    row = known & (slot != before)
    piece = known & (row | (i % PIECE == 0))
    tl.store(marks_L + i, (row.to(tl.int64) << 32) + piece.to(tl.int64), mask=inside)


@triton.jit
def cut(sorted_L, marks_L, sums_L, slots_U, first_U, begin_P, sizes, lookups, BLOCK: tl.constexpr):
    """Unique slots, the first piece of each, where each piece begins, and the numbers of rows, pieces and lookups."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < lookups
    marks = tl.load(marks_L + i, mask=inside, other=0)
    sums = tl.load(sums_L + i, mask=inside, other=0)
    row, piece = (sums >> 32) - 1, (sums & 0xFFFFFFFF) - 1
    slot = tl.load(sorted_L + i, mask=inside, other=0)
    new_row = inside & ((marks >> 32) != 0)
    tl.store(slots_U + row, slot.to(tl.int64), mask=new_row)
    tl.store(first_U + row, piece, mask=new_row)
    tl.store(begin_P + piece, i.to(tl.int64), mask=inside & ((marks & 0xFFFFFFFF) != 0))
    known = inside & (slot < 0x7FFFFFFF)
    next_known = tl.load(sorted_L + i + 1, mask=inside & (i + 1 < lookups), other=0x7FFFFFFF) < 0x7FFFFFFF
    last = known & ~next_known
    tl.store(sizes + tl.zeros([BLOCK], tl.int32), row + 1, mask=last)
    tl.store(sizes + tl.zeros([BLOCK], tl.int32) + 1, piece + 1, mask=last)
    tl.store(first_U + row + 1, piece + 1, mask=last)
    tl.store(begin_P + piece + 1, i.to(tl.int64) + 1, mask=last)


@triton.jit
def record_lookups(slots_U, first_U, begin_P, sizes, counts_S, last_S, previous_U, step, BLOCK: tl.constexpr):
    """Count each row's lookups, note the step, and keep the step before."""
    u = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    active = u < tl.load(sizes)
    slot = tl.load(slots_U + u, mask=active, other=0)
    start = tl.load(begin_P + tl.load(first_U + u, mask=active, other=0), mask=active, other=0)
    stop = tl.load(begin_P + tl.load(first_U + u + 1, mask=active, other=0), mask=active, other=0)
    count = (tl.load(counts_S + slot, mask=active, other=0).to(tl.int64) & 0xFFFFFFFF) + stop - start
    tl.store(counts_S + slot, tl.minimum(count, 0xFFFFFFFF).to(tl.int32), mask=active)
    tl.store(previous_U + u, tl.load(last_S + slot, mask=active, other=0), mask=active)
    tl.store(last_S + slot, tl.zeros([BLOCK], tl.int32) + tl.load(step), mask=active)


@triton.jit
def sum_pieces(
    order_L, slots_L, x_L, sample_L, piece_L, begin_P, sizes, bases, d_summed_BK, d_vectors_BOk, d_squares_B, sums_PK,
    fields, K: tl.constexpr, WIDE: tl.constexpr, STRIDE: tl.constexpr, SHIFT: tl.constexpr, DTYPE: tl.constexpr,
    ROW: tl.constexpr, BY_FIELD: tl.constexpr, SQUARES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of each piece's row from the piece's lookups, in their order."""
    pieces = tl.load(sizes + 1)
    if tl.program_id(0) * BLOCK >= pieces:
        return
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    active = p < pieces
    at = tl.load(begin_P + p, mask=active, other=0)
    stop = tl.load(begin_P + p + 1, mask=active, other=0)
    column = tl.arange(0, WIDE)
    linear = (column == 0)[None, :]
    factor = ((column >= 1) & (column < K))[None, :]
    total = tl.zeros([BLOCK, WIDE], DTYPE)
    d_norm = tl.zeros([BLOCK], DTYPE)
    first = tl.load(order_L + at, mask=active & (at < stop), other=0)
    slot = tl.load(slots_L + first, mask=active & (at < stop), other=0).to(tl.int64)
    while tl.max(stop - at) > 0:
        going = active & (at < stop)
        lookup = tl.load(order_L + at, mask=going, other=0)
        x = tl.load(x_L + lookup, mask=going, other=0)
        b = tl.load(sample_L + lookup, mask=going, other=0).to(tl.int64)
        both = going[:, None] & (linear | factor)
        d_row = tl.load(d_summed_BK + b[:, None] * K + column[None, :], mask=both, other=0)
        if BY_FIELD:
            o = tl.load(piece_L + lookup, mask=going, other=0).to(tl.int64)
            place = d_vectors_BOk + (b * fields + o)[:, None] * (K - 1) + column[None, :] - 1
            d_row += tl.load(place, mask=going[:, None] & factor, other=0)
        total += d_row * x[:, None]
        if SQUARES:
            d_norm += 2 * x * x * tl.load(d_squares_B + b, mask=going, other=0)
        at += 1
    if SQUARES:
        record = records(bases, slot, active, STRIDE, SHIFT, ROW, True)
        row = tl.load(record[:, None] + column[None, :], mask=active[:, None] & factor, other=0)
        total += d_norm[:, None] * row.to(DTYPE)
    tl.store(
        sums_PK + p.to(tl.int64)[:, None] * K + column[None, :], total, mask=active[:, None] & (column < K)[None, :]
    )


@triton.jit
def decay_rows(
    slots_U, factors_U, sizes, bases, ids_S, key,
    K: tl.constexpr, WIDE: tl.constexpr, STRIDE: tl.constexpr, SHIFT: tl.constexpr, DTYPE: tl.constexpr,
    ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Multiply rows by the decay that they have missed."""
    rows = tl.load(sizes)
    if tl.program_id(0) * BLOCK >= rows:
        return
    u = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    active = u < rows
    slot = tl.load(slots_U + u, mask=active, other=0)
    column = tl.arange(0, WIDE)
    both = active[:, None] & (column < K)[None, :]
    place = records(bases, slot, active, STRIDE, SHIFT, ROW, True)[:, None] + column[None, :]
    factor = tl.load(factors_U + u, mask=active, other=1).to(DTYPE)
    row = tl.load(place, mask=both, other=0).to(DTYPE) * factor[:, None]
    store_rows(place, row, both, tl.load(ids_S + slot, mask=active, other=0), tl.load(key), column, ROW)


@triton.jit
def square_rows(
    first_U, sums_PK, sizes, squares_B, K: tl.constexpr, WIDE: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):
    """The sum of squares of some rows' gradients, a number for each program."""
    u = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    active = u < tl.load(sizes)
    at = tl.load(first_U + u, mask=active, other=0)
    stop = tl.load(first_U + u + 1, mask=active, other=0)
    column = tl.arange(0, WIDE)
    g = tl.zeros([BLOCK, WIDE], DTYPE)
    while tl.max(stop - at) > 0:
        going = active & (at < stop)
        place = sums_PK + at[:, None] * K + column[None, :]
        g += tl.load(place, mask=going[:, None] & (column < K)[None, :], other=0)
        at += 1
    tl.store(squares_B + tl.program_id(0), tl.sum(tl.sum(g * g, 1), 0))


@triton.jit
def update_rows(
    slots_U, first_U, sums_PK, sizes, finite, numbers, bases, states, ids_S, key,
    RULE: tl.constexpr, K: tl.constexpr, Z: tl.constexpr, WIDE: tl.constexpr, STRIDE: tl.constexpr,
    STATE_STRIDE: tl.constexpr, SHIFT: tl.constexpr, DTYPE: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Apply a rule of weights/optimizer.py to the rows that a batch read, unless its loss is not finite.

    ``numbers`` are those that the CPU's kernels take, on the device: they change with the step.
    """
    rows = tl.load(sizes) * tl.load(finite)
    if tl.program_id(0) * BLOCK >= rows:
        return
    u = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    active = u < rows
    slot = tl.load(slots_U + u, mask=active, other=0)
    at = tl.load(first_U + u, mask=active, other=0)
    stop = tl.load(first_U + u + 1, mask=active, other=0)
    column = tl.arange(0, WIDE)
    inside = (column < K)[None, :]
    both = active[:, None] & inside
    g = tl.zeros([BLOCK, WIDE], DTYPE)
    while tl.max(stop - at) > 0:
        going = active & (at < stop)
        g += tl.load(sums_PK + at[:, None] * K + column[None, :], mask=going[:, None] & inside, other=0)
        at += 1
    place = records(bases, slot, active, STRIDE, SHIFT, ROW, True)[:, None] + column[None, :]
    held = records(states, slot, active, STATE_STRIDE, SHIFT, DTYPE, False)
    state_place = held[:, None] + column[None, :]
    row = tl.load(place, mask=both, other=0).to(DTYPE)
    rate, l2 = tl.load(numbers), tl.load(numbers + 1)
    if RULE == 0:
        row -= rate * (g + l2 * row)
    elif RULE == 1:
        g += l2 * row
        state = tl.load(state_place, mask=both, other=0) + g * g
        tl.store(state_place, state, mask=both)
        row -= rate * g / (_root(state) + tl.load(numbers + 2))
    elif RULE == 2:
        g += l2 * row
        eps = tl.load(numbers + 2)
        first = (column == 0)[None, :]
        square = g * g
        w_state = tl.load(held, mask=active, other=0) + tl.sum(tl.where(first, square, 0), 1)
        tl.store(held, w_state, mask=active)
        own = tl.where(first, w_state[:, None], 0)
        if Z > 1:
            mean = tl.sum(tl.where(first | ~inside, 0, square), 1) / (K - 1)
            v_state = tl.load(held + 1, mask=active, other=0) + mean
            tl.store(held + 1, v_state, mask=active)
            own = tl.where(first, w_state[:, None], v_state[:, None])
        row -= rate * g / (_root(own) + eps)
    elif RULE == 3:
        g += l2 * row
        eps, kept = tl.load(numbers + 2), tl.load(numbers + 3)
        m = tl.load(state_place, mask=both, other=0)
        n = tl.load(state_place + K, mask=both, other=0)
        m += tl.load(numbers + 4) * (g - m)
        n += tl.load(numbers + 5) * (g * g - n)
        tl.store(state_place, m, mask=both)
        tl.store(state_place + K, n, mask=both)
        row = kept * row - rate * m / (_root(n) + eps)
    else:
        # numbers: steep = 1 / rate, l2, beta, l1, group.
        beta, l1, group = tl.load(numbers + 2), tl.load(numbers + 3), tl.load(numbers + 4)
        z = tl.load(state_place, mask=both, other=0)
        n = tl.load(state_place + K, mask=both, other=0)
        root = _root(n)
        s = row * ((beta + root) * rate + l2)
        length = _root(tl.sum(tl.where(inside, s * s, 0), 1))
        stretch = tl.where(length > 0, (length + group) / tl.where(length > 0, length, 1), 0)
        sign = tl.where(row > 0, l1, tl.where(row < 0, -l1, 0))
        kept = tl.where(row == 0, z, -stretch[:, None] * s - sign)
        z = tl.where((z == 0) & (n == 0), -s, kept)
        n += g * g
        after = _root(n)
        z += g - (after - root) * rate * row
        tl.store(state_place, z, mask=both)
        tl.store(state_place + K, n, mask=both)
        s = tl.maximum(-l1, tl.minimum(z, l1)) - z
        length = _root(tl.sum(tl.where(inside, s * s, 0), 1))
        shrink = tl.where(length > group, (length - group) / tl.where(length > 0, length, 1), 0)
        divisor = (beta + after) * rate + l2
        row = tl.where(divisor > 0, shrink[:, None] * s / tl.where(divisor > 0, divisor, 1), row)
    store_rows(place, row, both, tl.load(ids_S + slot, mask=active, other=0), tl.load(key), column, ROW)

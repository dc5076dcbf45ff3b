"""Kernels of the rows: pooling forward, and gradients with the update of rows and state in one pass.

Sums have a fixed order and no float is added atomically, so two runs on one device have the same bits. Forward, a
sample's lookups are added field by field in their order. Backward is a segmented sum over the lookups sorted by slot,
cut in tiles of ``TILE``: lanes take a tile each and walk it in lockstep, so the work is the same whatever the skew. A
segment that begins and ends in its tile is summed in order and its row updated on the spot; what crosses tiles is left
as one sum for each tile, which ``update_crossing`` adds in a fixed order before it updates those rows. A row with a
million lookups is spread over the device like all others.

``control`` holds what changes with the step, in int64: see device/batch.py. Lookups that are ``PLAIN``, one for each
field and sample, field by field, need no ``sample_L``, ``piece_L`` and offsets; without ``HAS_X`` each x is 1.

Dims: B samples, O fields, L lookups, T tiles, K numbers per row, k = K - 1 factors, Z numbers of state.
"""

from __future__ import annotations

import triton
import triton.language as tl

from des_core.engine.device.id_kernels import splitmix64

TILE = 32
TILES = 8
"""Tiles that one program walks side by side."""
CROSSED = 64
"""Tiles of one row whose sums are added at a time."""
SAMPLES = 16
ROWS = 64
SGD, ADAGRAD, ROWWISE_ADAGRAD, ADAM, FTRL, GRADIENT, SQUARE = 0, 1, 2, 3, 4, 5, 6
"""Rules; the last two write a row's gradient in its place, and keep the square of its length, in ``norms_L``."""


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
def number(control, at, DTYPE: tl.constexpr):
    """A number of the rule, which ``control`` holds by its bits in float64 from place 4 on."""
    return tl.load(control + 4 + at).to(tl.float64, bitcast=True).to(DTYPE)


@triton.jit
def pool_forward(
    slots_L, x_L, offsets_OB, bases, summed_BK, vectors_BOk, squares_B, samples, fields,
    K: tl.constexpr, WIDE: tl.constexpr, STRIDE: tl.constexpr, SHIFT: tl.constexpr, DTYPE: tl.constexpr,
    ROW: tl.constexpr, BY_FIELD: tl.constexpr, SQUARES: tl.constexpr, PLAIN: tl.constexpr, HAS_X: tl.constexpr,
    BLOCK: tl.constexpr,
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
        if PLAIN:
            at = (o * samples + b).to(tl.int64)
            stop = at + inside.to(tl.int64)
        else:
            at = tl.load(offsets_OB + o * samples + b, mask=inside, other=0)
            stop = tl.load(offsets_OB + o * samples + b + 1, mask=inside, other=0)
        vector = tl.zeros([BLOCK, WIDE], DTYPE)
        if PLAIN:
            scaled = row_of_lookup(
                at, stop, slots_L, x_L, bases, column, K, WHOLE, STRIDE, SHIFT, DTYPE, ROW, HAS_X
            )  # fmt: skip
            vector = scaled
            if SQUARES:
                v = tl.where((column >= 1)[None, :], scaled, 0)
                squares += tl.sum(v * v, 1)
        else:
            while tl.max(stop - at) > 0:
                scaled = row_of_lookup(
                    at, stop, slots_L, x_L, bases, column, K, WHOLE, STRIDE, SHIFT, DTYPE, ROW, HAS_X
                )  # fmt: skip
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
def row_of_lookup(
    at, stop, slots_L, x_L, bases, column, K: tl.constexpr, WHOLE: tl.constexpr, STRIDE: tl.constexpr,
    SHIFT: tl.constexpr, DTYPE: tl.constexpr, ROW: tl.constexpr, HAS_X: tl.constexpr,
):  # fmt: skip
    """x times the rows of lookups, zero from ``stop`` on and without a row."""
    slot = tl.load(slots_L + at, mask=at < stop, other=-1).to(tl.int64)
    known = (at < stop) & (slot >= 0)
    record = records(bases, slot, known, STRIDE, SHIFT, ROW, True)
    row = tl.load(record[:, None] + column[None, :], mask=known[:, None] & (column < WHOLE)[None, :], other=0)
    scaled = tl.where((column < K)[None, :], row.to(DTYPE), 0)
    if HAS_X:
        scaled = scaled * tl.load(x_L + at, mask=known, other=0).to(DTYPE)[:, None]
    return scaled


@triton.jit
def meet_rows(
    sorted_L, counts_S, last_S, control, bases, ids_S, decay_P2, pieces, lookups,
    K: tl.constexpr, WIDE: tl.constexpr, STRIDE: tl.constexpr, SHIFT: tl.constexpr, DTYPE: tl.constexpr,
    ROW: tl.constexpr, DECAY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count each row's lookups and note the step; with ``DECAY`` multiply rows by the decay that they have missed.

    ``decay_P2`` holds in float64, piece by piece, the step after which a share is taken off and log(1 - share).
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(sorted_L + i, mask=i < lookups, other=-1).to(tl.int64)
    before = tl.load(sorted_L + i - 1, mask=(i < lookups) & (i > 0), other=-1).to(tl.int64)
    first = (slot >= 0) & (slot != before)
    # The number of lookups, in (low, high]: doubled until it is too large, then halved.
    low, high = tl.zeros([BLOCK], tl.int64), tl.full([BLOCK], 1, tl.int64)
    going = first
    while tl.sum(going.to(tl.int32)) > 0:
        same = going & (i + high < lookups)
        same = same & (tl.load(sorted_L + i + high, mask=same, other=-1).to(tl.int64) == slot)
        low, high = tl.where(same, high, low), tl.where(same, 2 * high, high)
        going = same
    while tl.max(tl.where(first, high - low, 0)) > 1:
        middle = (low + high) // 2
        same = first & (i + middle < lookups)
        same = same & (tl.load(sorted_L + i + middle, mask=same, other=-1).to(tl.int64) == slot)
        low, high = tl.where(same, middle, low), tl.where(same, high, middle)
    count = (tl.load(counts_S + slot, mask=first, other=0).to(tl.int64) & 0xFFFFFFFF) + high
    tl.store(counts_S + slot, tl.minimum(count, 0xFFFFFFFF).to(tl.int32), mask=first)
    step = tl.load(control)
    if DECAY:
        # A row born in this step missed nothing.
        previous = tl.minimum(tl.load(last_S + slot, mask=first, other=0).to(tl.int64) & 0xFFFFFFFF, step - 1)
        log = tl.zeros([BLOCK], tl.float64)
        for piece in range(pieces):
            start = tl.load(decay_P2 + 2 * piece).to(tl.int64)
            stop = step - 1
            if piece + 1 < pieces:
                stop = tl.minimum(stop, tl.load(decay_P2 + 2 * piece + 2).to(tl.int64))
            log += tl.maximum(stop - tl.maximum(previous, start), 0).to(tl.float64) * tl.load(decay_P2 + 2 * piece + 1)
        factor = tl.exp(log).to(DTYPE)
        column = tl.arange(0, WIDE)
        both = first[:, None] & (column < K)[None, :]
        place = records(bases, slot, first, STRIDE, SHIFT, ROW, True)[:, None] + column[None, :]
        row = tl.load(place, mask=both, other=0).to(DTYPE) * factor[:, None]
        store_rows(place, row, both, tl.load(ids_S + slot, mask=first, other=0), tl.load(control + 3), column, ROW)
    tl.store(last_S + slot, (tl.zeros([BLOCK], tl.int64) + step).to(tl.int32), mask=first)


@triton.jit
def update_rows(
    sorted_L, order_L, x_L, sample_L, piece_L, d_linear_B, d_sums_Bk, d_vectors_BOk, d_squares_B, came_TC, leave_TC,
    finite, control, norms_L, scale, bases, states, ids_S, lookups, samples, fields, linear_stride, sums_stride,
    RULE: tl.constexpr, K: tl.constexpr, Z: tl.constexpr, WIDE: tl.constexpr, STRIDE: tl.constexpr,
    STATE_STRIDE: tl.constexpr, SHIFT: tl.constexpr, DTYPE: tl.constexpr, ROW: tl.constexpr, BY_FIELD: tl.constexpr,
    SQUARES: tl.constexpr, CLIP: tl.constexpr, PLAIN: tl.constexpr, HAS_X: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Apply a rule of weights/optimizer.py to the rows that a batch read, unless its loss is not finite.

    Rows whose lookups cross tiles are left as sums [T, K + 1], the last of which belongs to the squares: ``came`` of
    the lookups of a segment that began in a tile before, ``leave`` of one that begins here and goes on.
    """
    if tl.load(finite) == 0:
        return
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, WIDE)
    linear = (column == 0)[None, :]
    factor = ((column >= 1) & (column < K))[None, :]
    total = tl.zeros([BLOCK, WIDE], DTYPE)
    d_norm = tl.zeros([BLOCK], DTYPE)
    at = t * TILE
    slot = tl.load(sorted_L + at, mask=at < lookups, other=-1).to(tl.int64)
    before = tl.load(sorted_L + at - 1, mask=(at < lookups) & (at > 0), other=-1).to(tl.int64)
    # Whether the present segment began in this tile.
    own = slot != before
    for _ in range(TILE):
        known = (at < lookups) & (slot >= 0)
        after = tl.load(sorted_L + at + 1, mask=at + 1 < lookups, other=-1).to(tl.int64)
        lookup = tl.load(order_L + at, mask=known, other=0)
        if PLAIN:
            b, o = (lookup.to(tl.int32) % samples).to(tl.int64), (lookup.to(tl.int32) // samples).to(tl.int64)
        else:
            b = tl.load(sample_L + lookup, mask=known, other=0).to(tl.int64)
            o = tl.load(piece_L + lookup, mask=known, other=0).to(tl.int64)
        d_row = tl.load((d_linear_B + b * linear_stride)[:, None] + 0 * column, mask=known[:, None] & linear, other=0)
        place = d_sums_Bk + (b * sums_stride)[:, None] + column[None, :] - 1
        d_row += tl.load(place, mask=known[:, None] & factor, other=0)
        if BY_FIELD:
            place = d_vectors_BOk + (b * fields + o)[:, None] * (K - 1) + column[None, :] - 1
            d_row += tl.load(place, mask=known[:, None] & factor, other=0)
        x = tl.full([BLOCK], 1, DTYPE)
        if HAS_X:
            x = tl.load(x_L + lookup, mask=known, other=0).to(DTYPE)
            d_row = d_row * x[:, None]
        total += d_row
        if SQUARES:
            d_norm += 2 * x * x * tl.load(d_squares_B + b, mask=known, other=0)
        ends = known & (after != slot)
        apply_rule(
            total, d_norm, slot, ends & own, at, control, norms_L, scale, bases, states, ids_S,
            RULE, K, Z, WIDE, STRIDE, STATE_STRIDE, SHIFT, DTYPE, ROW, SQUARES, CLIP,
        )  # fmt: skip
        leave(came_TC, t, total, d_norm, ends & ~own, column, K)
        total = tl.where(ends[:, None], 0, total)
        d_norm = tl.where(ends, 0, d_norm)
        own = own | (after != slot)
        slot = after
        at += 1
    # The lookup after the tile's last one is of the same row.
    goes_on = (at < lookups) & (slot >= 0) & (tl.load(sorted_L + at - 1, mask=at < lookups, other=-1) == slot)
    leave(leave_TC, t, total, d_norm, goes_on & own, column, K)
    leave(came_TC, t, total, d_norm, goes_on & ~own, column, K)


@triton.jit
def losses(logits_b, labels_b, losses_b, gradient_b, many, scale, RATING: tl.constexpr, BLOCK: tl.constexpr):
    """Each sample's share of the loss, log loss or squared error, and its gradient."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < many
    x = tl.load(logits_b + i, mask=inside, other=0)
    y = tl.load(labels_b + i, mask=inside, other=0)
    small = tl.exp(-tl.abs(x))
    if RATING:
        loss, slope = (x - y) * (x - y), 2 * (x - y)
    else:
        loss = tl.maximum(x, 0) - x * y + tl.log(1 + small)
        # Not a number where x is none: a maximum would drop it.
        loss = tl.where(x == x, loss, x)
        slope = tl.where(x >= 0, 1, small) / (1 + small) - y
    share = tl.load(scale)
    tl.store(losses_b + i, loss * share, mask=inside)
    tl.store(gradient_b + i, slope * share, mask=inside)


@triton.jit
def judge(mean, finite):
    """Forbid every update from the first loss on that is not finite."""
    loss = tl.load(mean)
    tl.store(finite, tl.where(tl.abs(loss) < float("inf"), tl.load(finite), 0))


@triton.jit
def update_dense(tiles_T5, gradients, finite, control, RULE: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Apply a rule to the dense weights, unless the loss is not finite: torch's arithmetic, all weights in one launch.

    A tile is the addresses of its weights and of two kinds of state, where its gradients begin, and their number.
    """
    if tl.load(finite) == 0:
        return
    tile = tiles_T5 + tl.program_id(0) * 5
    i = tl.arange(0, BLOCK)
    inside = i < tl.load(tile + 4)
    weight = tl.load(tile).to(tl.pointer_type(DTYPE)) + i
    first = tl.load(tile + 1).to(tl.pointer_type(DTYPE)) + i
    second = tl.load(tile + 2).to(tl.pointer_type(DTYPE)) + i
    w = tl.load(weight, mask=inside, other=0)
    rate, l2, eps = number(control, 6, DTYPE), number(control, 7, DTYPE), number(control, 8, DTYPE)
    g = tl.load(gradients + tl.load(tile + 3) + i, mask=inside, other=0) + l2 * w
    if RULE == 0:
        w -= rate * g
    elif RULE == 1:
        total = tl.load(first, mask=inside, other=0) + g * g
        tl.store(first, total, mask=inside)
        w -= rate * g / (_root(total) + eps)
    else:
        w = w * number(control, 9, DTYPE)
        m = tl.load(first, mask=inside, other=0)
        n = tl.load(second, mask=inside, other=0)
        m += number(control, 10, DTYPE) * (g - m)
        n = number(control, 11, DTYPE) * n + number(control, 12, DTYPE) * g * g
        tl.store(first, m, mask=inside)
        tl.store(second, n, mask=inside)
        w -= rate * m / (_root(n) / number(control, 13, DTYPE) + eps)
    tl.store(weight, w, mask=inside)


@triton.jit
def leave(sums_TC, t, total, d_norm, which, column, K: tl.constexpr):
    """Keep the sums of tiles."""
    place = sums_TC + t * (K + 1)
    tl.store(place[:, None] + column[None, :], total, mask=which[:, None] & (column < K)[None, :])
    tl.store(place + K, d_norm, mask=which)


@triton.jit
def update_crossing(
    sorted_L, came_TC, leave_TC, finite, control, norms_L, scale, bases, states, ids_S, lookups,
    RULE: tl.constexpr, K: tl.constexpr, Z: tl.constexpr, WIDE: tl.constexpr, STRIDE: tl.constexpr,
    STATE_STRIDE: tl.constexpr, SHIFT: tl.constexpr, DTYPE: tl.constexpr, ROW: tl.constexpr, SQUARES: tl.constexpr,
    CLIP: tl.constexpr, TILE: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """As ``update_rows``, for the row whose lookups begin in a tile and go on in the next."""
    t = tl.program_id(0).to(tl.int64)
    end = (t + 1) * TILE
    if end >= lookups:
        return
    slot = tl.load(sorted_L + end).to(tl.int64)
    if (slot < 0) | (tl.load(sorted_L + end - 1) != slot) | (tl.load(finite) == 0):
        return
    if (t > 0) & (tl.load(sorted_L + tl.maximum(t * TILE - 1, 0)) == slot):
        return
    column = tl.arange(0, WIDE)
    inside = column < K
    total = tl.load(leave_TC + t * (K + 1) + column, mask=inside, other=0)
    d_norm = tl.load(leave_TC + t * (K + 1) + K)
    tile = t + 1 + tl.arange(0, MANY).to(tl.int64)
    more = 1
    while more > 0:
        first = tl.minimum(tile * TILE, lookups)
        came = (first < lookups) & (tl.load(sorted_L + first, mask=first < lookups, other=-1) == slot)
        place = came_TC + tile * (K + 1)
        part = tl.load(place[:, None] + column[None, :], mask=came[:, None] & inside[None, :], other=0)
        total += tl.sum(part, 0)
        d_norm += tl.sum(tl.load(place + K, mask=came, other=0), 0)
        more = tl.min(came.to(tl.int32), 0)
        tile += MANY
    one = tl.arange(0, 1)
    apply_rule(
        total[None, :], d_norm + one.to(DTYPE), slot + one, one == 0, end + one, control, norms_L, scale, bases, states,
        ids_S, RULE, K, Z, WIDE, STRIDE, STATE_STRIDE, SHIFT, DTYPE, ROW, SQUARES, CLIP,
    )  # fmt: skip


@triton.jit
def apply_rule(
    g, d_norm, slot, active, at, control, norms_L, scale, bases, states, ids_S,
    RULE: tl.constexpr, K: tl.constexpr, Z: tl.constexpr, WIDE: tl.constexpr, STRIDE: tl.constexpr,
    STATE_STRIDE: tl.constexpr, SHIFT: tl.constexpr, DTYPE: tl.constexpr, ROW: tl.constexpr, SQUARES: tl.constexpr,
    CLIP: tl.constexpr,
):  # fmt: skip
    """Update the rows of slots by the sums over their lookups; with ``CLIP`` times a number.

    Args:
        at: a lookup of each.
    """
    column = tl.arange(0, WIDE)
    inside = (column < K)[None, :]
    both = active[:, None] & inside
    place = records(bases, slot, active, STRIDE, SHIFT, ROW, True)[:, None] + column[None, :]
    held = records(states, slot, active, STATE_STRIDE, SHIFT, DTYPE, False)
    state_place = held[:, None] + column[None, :]
    row = tl.load(place, mask=both, other=0).to(DTYPE)
    if SQUARES:
        g += d_norm[:, None] * tl.where((column >= 1)[None, :], row, 0)
    if CLIP:
        g = g * tl.load(scale)
    rate, l2 = number(control, 0, DTYPE), number(control, 1, DTYPE)
    if RULE == 0:
        row -= rate * (g + l2 * row)
    elif RULE == 1:
        g += l2 * row
        state = tl.load(state_place, mask=both, other=0) + g * g
        tl.store(state_place, state, mask=both)
        row -= rate * g / (_root(state) + number(control, 2, DTYPE))
    elif RULE == 2:
        g += l2 * row
        eps = number(control, 2, DTYPE)
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
        eps, kept = number(control, 2, DTYPE), number(control, 3, DTYPE)
        m = tl.load(state_place, mask=both, other=0)
        n = tl.load(state_place + K, mask=both, other=0)
        m += number(control, 4, DTYPE) * (g - m)
        n += number(control, 5, DTYPE) * (g * g - n)
        tl.store(state_place, m, mask=both)
        tl.store(state_place + K, n, mask=both)
        row = kept * row - rate * m / (_root(n) + eps)
    elif RULE == 5:
        row = g
    elif RULE == 6:
        tl.store(norms_L + at, tl.sum(tl.where(inside, g * g, 0), 1), mask=active)
    else:
        # numbers: steep = 1 / rate, l2, beta, l1, group.
        beta, l1, group = number(control, 2, DTYPE), number(control, 3, DTYPE), number(control, 4, DTYPE)
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
    if RULE != 6:
        store_rows(place, row, both, tl.load(ids_S + slot, mask=active, other=0), tl.load(control + 2), column, ROW)

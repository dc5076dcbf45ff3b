"""Rows of a table on a device, in chunks: growth adds chunks and never copies a row.

A record is [w | v_1 .. v_k | state], padded to 16 bytes, so that a row and its optimizer state are read together: 80
bytes for k = 16 with row-wise Adagrad, which lie in 3 sectors of 32 bytes wherever they begin, as 96 would. Rows of 16
bits have records of their own, and their state, which stays in 32 bits, lies in others. Kernels find a record by
a table of the chunks' addresses: ``bases[slot >> SHIFT] + (slot & MASK) * stride``.

Dims: S slots, K numbers per row, Z numbers of optimizer state, n slots of a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from des_core.engine.device.support import no_room

CHUNK_BITS = 20
"""Slots of a chunk, as a power of two: a record of 80 bytes makes chunks of 84 MB."""
MOST_CHUNKS = 1 << 12
"""Of 2^20 slots each: as many slots as the index takes."""


class DeviceRows:
    """Records of rows and their state.

    Args:
        width, state_width: K and Z.
        device, dtype: of the numbers.
        chunk_bits: slots of a chunk, as a power of two.
        half: keep rows in bfloat16.
        allocate: makes a chunk of a shape.
        chunks: at the most.
    """

    def __init__(
        self,
        width: int,
        state_width: int,
        device: torch.device,
        dtype: torch.dtype,
        chunk_bits: int = CHUNK_BITS,
        half: bool = False,
        allocate: Callable[..., Tensor] = torch.empty,
        chunks: int = MOST_CHUNKS,
    ) -> None:
        self.width, self.state_width, self.device, self.dtype = width, state_width, device, dtype
        self.shift, self.row_dtype = chunk_bits, torch.bfloat16 if half else dtype
        self._half, self._allocate = half, allocate
        self.stride = _padded(width if half else width + state_width, self.row_dtype)
        self.state_stride = _padded(max(state_width, 1), dtype) if half else self.stride
        self._chunks: list[Tensor] = []
        self._states: list[Tensor] = []
        # Of fixed size, so that their own addresses never change.
        self.bases, self.states = (torch.zeros(chunks, dtype=torch.int64, device=device) for _ in range(2))

    @property
    def slots(self) -> int:
        """Slots that there is room for."""
        return len(self._chunks) << self.shift

    @property
    def slot_bytes(self) -> int:
        """Memory of a slot."""
        own = self.stride * _size(self.row_dtype)
        return own + self.state_stride * _size(self.dtype) if self._half else own

    @property
    def held_bytes(self) -> int:
        """Memory of all chunks."""
        return self.slots * self.slot_bytes

    @classmethod
    def of(cls, rows_UK: Tensor) -> DeviceRows:
        """A copy of rows without state, in one chunk."""
        rows = cls(rows_UK.shape[1], 0, rows_UK.device, rows_UK.dtype, chunk_bits=31, chunks=1)
        chunk = rows_UK.new_zeros(max(len(rows_UK), 1), rows.stride)
        chunk[: len(rows_UK), : rows.width] = rows_UK
        rows._chunks, rows._states = [chunk], [chunk[:, rows.width :]]
        for addresses in (rows.bases, rows.states):
            addresses.fill_(chunk.data_ptr())
        return rows

    def grow(self, slots: int) -> None:
        """Make room for ``slots``; what new ones hold is anything.

        Raises:
            UserError: the device has no room.
        """
        while self.slots < slots:
            many, number = 1 << self.shift, len(self._chunks)
            try:
                chunk = self._allocate((many, self.stride), dtype=self.row_dtype, device=self.device)
                state = chunk[:, self.width :]
                if self._half:
                    state = self._allocate((many, self.state_stride), dtype=self.dtype, device=self.device)
            except (torch.OutOfMemoryError, MemoryError):
                what = f"{slots:,} rows of {self.width} numbers"
                raise no_room(self.device, what, slots * self.slot_bytes, self.slots, self.slot_bytes) from None
            self.bases[number], self.states[number] = chunk.data_ptr(), state.data_ptr()
            self._chunks.append(chunk)
            self._states.append(state)

    def pieces(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows [n, K] and state [n, Z] of slots [start, stop), chunk by chunk; views."""
        while start < stop:
            number, first = start >> self.shift, start & ((1 << self.shift) - 1)
            last = min(first + stop - start, 1 << self.shift)
            rows, state = self._chunks[number][first:last], self._states[number][first:last]
            yield rows[:, : self.width], state[:, : self.state_width]
            start += last - first

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rows [n, K] and state [n, Z] of slots [start, stop), in the precision that they are computed in."""
        found = list(self.pieces(start, stop))
        rows = [torch.empty(0, self.width, dtype=self.dtype, device=self.device)]
        states = [torch.empty(0, self.state_width, dtype=self.dtype, device=self.device)]
        rows += [row.to(self.dtype) for row, _ in found]
        return torch.cat(rows), torch.cat(states + [state for _, state in found])

    def write(self, start: int, rows_nK: Tensor, state_nZ: Tensor) -> None:
        """Put rows and their state into slots from ``start`` on, which there is room for."""
        done = 0
        for rows, state in self.pieces(start, start + len(rows_nK)):
            part = slice(done, done + len(rows))
            rows.copy_(rows_nK[part])
            state.copy_(state_nZ[part])
            done += len(rows)

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy slots ``source`` over slots ``target``; no slot is in both."""
        mask = (1 << self.shift) - 1
        for chunks in (self._chunks, self._states) if self._half else (self._chunks,):
            for number, chunk in enumerate(chunks):
                into = ((target >> self.shift) == number).nonzero()[:, 0]
                for other, origin in enumerate(chunks):
                    both = into[(source[into] >> self.shift) == other]
                    if len(both):
                        chunk[target[both] & mask] = origin[source[both] & mask]

    def release(self, slots: int) -> None:
        """Give back the chunks after the first ``slots``."""
        keep = -(-slots >> self.shift) if slots else 0
        del self._chunks[keep:], self._states[keep:]


def _size(dtype: torch.dtype) -> int:
    return torch.empty(0, dtype=dtype).element_size()


def _padded(numbers: int, dtype: torch.dtype) -> int:
    """So many numbers and more, to 16 bytes."""
    each = 16 // _size(dtype)
    return -(-numbers // each) * each

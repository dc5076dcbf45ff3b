"""Rows of a table on a device, in chunks: growth adds chunks and never copies a row.

A record is [w | v_1 .. v_k | state], padded to 16 bytes, so that a row and its optimizer state are read together.
Kernels find a record by a table of the chunks' addresses: ``bases[slot >> SHIFT] + (slot & MASK) * stride``.

Dims: S slots, K numbers per row, Z numbers of optimizer state, n slots of a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from des_core.errors import UserError
from des_core.log import byte_text

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
        allocate: makes a chunk of zeros of a shape.
    """

    def __init__(
        self,
        width: int,
        state_width: int,
        device: torch.device,
        dtype: torch.dtype,
        chunk_bits: int = CHUNK_BITS,
        allocate: Callable[..., Tensor] = torch.empty,
    ) -> None:
        self.width, self.state_width, self.device, self.dtype = width, state_width, device, dtype
        self.shift = chunk_bits
        numbers = 16 // torch.empty(0, dtype=dtype).element_size()
        self.stride = -(-(width + state_width) // numbers) * numbers
        self._allocate = allocate
        self._chunks: list[Tensor] = []
        # Of fixed size, so that its own address never changes.
        self.bases = torch.zeros(MOST_CHUNKS, dtype=torch.int64, device=device)

    @property
    def slots(self) -> int:
        """Slots that there is room for."""
        return len(self._chunks) << self.shift

    @property
    def held_bytes(self) -> int:
        """Memory of all chunks."""
        return self.slots * self.stride * torch.empty(0, dtype=self.dtype).element_size()

    def grow(self, slots: int) -> None:
        """Make room for ``slots``; what new ones hold is anything.

        Raises:
            UserError: the device has no room.
        """
        while self.slots < slots:
            shape = (1 << self.shift, self.stride)
            try:
                chunk = self._allocate(shape, dtype=self.dtype, device=self.device)
            except (torch.OutOfMemoryError, MemoryError):
                raise self._no_room(slots) from None
            self.bases[len(self._chunks)] = chunk.data_ptr()
            self._chunks.append(chunk)

    def _no_room(self, slots: int) -> UserError:
        size = torch.empty(0, dtype=self.dtype).element_size()
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0
        fits = self.slots + free // (self.stride * size)
        return UserError(
            f"{slots:,} rows of {self.width} numbers need {byte_text(slots * self.stride * size)} on {self.device}, "
            f"which has {byte_text(free)} free beside the {self.slots:,} rows there; set table.max_rows to at most "
            f"{fits:,} per worker, lower model.factors, or use more GPUs"
        )

    def pieces(self, start: int, stop: int) -> Iterator[Tensor]:
        """Records [n, stride] of slots [start, stop), chunk by chunk; views."""
        while start < stop:
            number, first = start >> self.shift, start & ((1 << self.shift) - 1)
            last = min(first + stop - start, 1 << self.shift)
            yield self._chunks[number][first:last]
            start += last - first

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Rows [n, K] and state [n, Z] of slots [start, stop)."""
        empty = torch.empty(0, self.stride, dtype=self.dtype, device=self.device)
        records = torch.cat([empty, *self.pieces(start, stop)])
        return records[:, : self.width], records[:, self.width : self.width + self.state_width]

    def write(self, start: int, rows_nK: Tensor, state_nZ: Tensor) -> None:
        """Put rows and their state into slots from ``start`` on, which there is room for."""
        done = 0
        for piece in self.pieces(start, start + len(rows_nK)):
            part = slice(done, done + len(piece))
            piece[:, : self.width] = rows_nK[part]
            piece[:, self.width : self.width + self.state_width] = state_nZ[part]
            done += len(piece)

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy slots ``source`` over slots ``target``; no slot is in both."""
        for number, chunk in enumerate(self._chunks):
            into = ((target >> self.shift) == number).nonzero()[:, 0]
            for other, origin in enumerate(self._chunks):
                both = into[(source[into] >> self.shift) == other]
                if len(both):
                    mask = (1 << self.shift) - 1
                    chunk[target[both] & mask] = origin[source[both] & mask]

    def release(self, slots: int) -> None:
        """Give back the chunks after the first ``slots``."""
        keep = -(-slots >> self.shift) if slots else 0
        del self._chunks[keep:]

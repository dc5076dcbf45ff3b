"""A batch on a device: its lookups, and the same lookups sorted by row.

Sorted once, they serve the counts, the gradients and the update. Numbers of rows and pieces stay on the device; arrays
have room for as many as there are lookups.

Dims: B samples, O fields, L lookups, U unique rows, P pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from des_core.engine.device import row_kernels
from des_core.engine.device.table import BLOCK, DeviceKeys, grid

NO_ROW = 0x7FFFFFFF


@dataclass(frozen=True)
class Segments:
    """The lookups of each row, in their order."""

    order_L: Tensor
    """Lookups, sorted by slot; those without a row are the last."""
    slots_U: Tensor
    first_U: Tensor
    """The first piece of each row, and an end."""
    begin_P: Tensor
    """Where each piece begins in the order, and an end."""
    sizes_2: Tensor
    """Numbers of rows and of pieces."""
    previous_U: Tensor
    """The step before this one that looked up each row, uint32 in the bits of int32."""

    def record(self, keys: DeviceKeys, step: int) -> None:
        """Count the lookups of each row at a step."""
        step_1 = torch.full((1,), step, dtype=torch.int32, device=self.order_L.device)
        row_kernels.record_lookups[grid(len(self.slots_U))](
            self.slots_U, self.first_U, self.begin_P, self.sizes_2, keys.counts, keys.last, self.previous_U, step_1,
            BLOCK=BLOCK,
        )  # fmt: skip


def segments_of(slots_L: Tensor) -> Segments:
    """The lookups of slots, -1 without a row, by row."""
    lookups, device = len(slots_L), slots_L.device
    keys_L = torch.where(slots_L < 0, NO_ROW, slots_L).to(torch.int32)
    sorted_L, order_L = torch.sort(keys_L, stable=True)
    marks_L = torch.empty(lookups, dtype=torch.int64, device=device)
    row_kernels.mark[grid(lookups)](sorted_L, marks_L, lookups, PIECE=row_kernels.PIECE, BLOCK=BLOCK)
    sums_L = marks_L.cumsum(0)
    slots_U, begin_P = (torch.zeros(lookups + 1, dtype=torch.int64, device=device) for _ in range(2))
    first_U = torch.zeros(lookups + 1, dtype=torch.int64, device=device)
    sizes_2 = torch.zeros(2, dtype=torch.int64, device=device)
    row_kernels.cut[grid(lookups)](
        sorted_L, marks_L, sums_L, slots_U, first_U, begin_P, sizes_2, lookups, BLOCK=BLOCK
    )  # fmt: skip
    previous_U = torch.zeros(lookups, dtype=torch.int32, device=device)
    return Segments(order_L, slots_U[:lookups], first_U, begin_P, sizes_2, previous_U)

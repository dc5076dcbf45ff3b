"""Rows read, added up, and updated without a copy of them in between: what weights/pooling.py and optimizer.py do.

Forward reads rows by slot and hands operators the sums of each sample. Their gradients come back through autograd
to a ``Pooled``, which keeps them: the update waits until the loss is known to be finite, and then turns them into the
rows' gradients and applies the rule in one go.

Dims: B samples, O fields owned here, L lookups, U unique rows, K numbers per row, k = K - 1 factors, T tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from des_core.engine.device import row_kernels
from des_core.engine.device.batch import CONTROL, Places, Segments, segments_of
from des_core.engine.device.rows import DeviceRows
from des_core.engine.device.support import kernel_type
from des_core.engine.device.table import grid

RULES = {
    "sgd": row_kernels.SGD,
    "adagrad": row_kernels.ADAGRAD,
    "rowwise_adagrad": row_kernels.ROWWISE_ADAGRAD,
    "adam": row_kernels.ADAM,
    "adamw": row_kernels.ADAM,
    "ftrl": row_kernels.FTRL,
    "group_ftrl": row_kernels.FTRL,
}


@dataclass
class Pooled:
    """The lookups of a batch with their slots; after backward, the gradients of what was added up."""

    rows: DeviceRows
    ids_S: Tensor
    """Ids in slot order."""
    slots_L: Tensor
    """int32, -1 without a row."""
    places: Places
    by_field: bool
    squares: bool
    source_UK: Tensor | None = None
    """What ``rows`` is a copy of, if it asks for a gradient."""
    gradients: list[Tensor] = field(default_factory=list)
    scale: Tensor | None = None
    """What the rows' gradients are multiplied by, a number on the device; None: 1."""

    @property
    def shape(self) -> dict[str, Any]:
        """What kernels are compiled for."""
        rows = self.rows
        return {
            "K": rows.width,
            "WIDE": 1 << (rows.width - 1).bit_length() if rows.width > 1 else 1,
            "STRIDE": rows.stride,
            "SHIFT": rows.shift,
            "DTYPE": kernel_type(rows.dtype),
            "ROW": kernel_type(rows.row_dtype),
        }

    @property
    def _reads(self) -> dict[str, bool]:
        places = self.places
        return {
            "BY_FIELD": self.by_field, "SQUARES": self.squares, "PLAIN": places.plain,
            "HAS_X": places.x_L is not None,
        }  # fmt: skip

    def _or_none(self, tensor: Tensor | None) -> Tensor:
        # A kernel that does not read an argument is still given one.
        return self.slots_L if tensor is None else tensor

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sums of w [B] and of v [B, k], vectors [B, O, k] and squares [B]; the latter two are [.., 0, ..] and [0]
        where none asks."""
        rows, places = self.rows, self.places
        fields = places.fields if self.by_field else 0
        summed_BK = torch.empty(places.samples, rows.width, dtype=rows.dtype, device=rows.device)
        vectors_BOk = torch.empty(places.samples, fields, rows.width - 1, dtype=rows.dtype, device=rows.device)
        squares_B = torch.empty(places.samples if self.squares else 0, dtype=rows.dtype, device=rows.device)
        row_kernels.pool_forward[grid(places.samples, row_kernels.SAMPLES)](
            self.slots_L, self._or_none(places.x_L), self._or_none(places.offsets_OB), rows.bases, summed_BK,
            vectors_BOk, squares_B, places.samples, places.fields, **self.shape, **self._reads,
            BLOCK=row_kernels.SAMPLES,
        )  # fmt: skip
        return summed_BK[:, 0], summed_BK[:, 1:], vectors_BOk, squares_B

    def with_gradients(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As ``forward``; backward leaves the gradients here, or takes them on to what the rows are a copy of."""
        anchor = self.source_UK
        if anchor is None:
            # What it holds is of no interest, but that it asks for a gradient.
            anchor = torch.empty(0, dtype=self.rows.dtype, device=self.rows.device, requires_grad=True)
        linear_B, sums_Bk, vectors_BOk, squares_B = _Pool.apply(anchor, self)  # type: ignore[no-untyped-call]
        return linear_B, sums_Bk, vectors_BOk, squares_B

    def update(self, segments: Segments, rule: str, control: Tensor, finite: Tensor) -> None:
        """Apply a rule to the rows, unless ``finite`` (a number on the device) is zero."""
        if self.gradients and len(self.slots_L):
            self._update(segments, RULES[rule], control, finite)

    def row_squares(self, segments: Segments, control: Tensor) -> Tensor:
        """The sum of squares [1] of all rows' gradients, of a backward that is done."""
        norms_L = torch.zeros(max(len(self.slots_L), 1), dtype=self.rows.dtype, device=self.rows.device)
        if self.gradients and len(self.slots_L):
            one = torch.ones(1, dtype=torch.int32, device=self.rows.device)
            self._update(segments, row_kernels.SQUARE, control, one, norms_L)
        return norms_L.sum().reshape(1)

    def source_gradient(self) -> Tensor:
        """The gradient [U, K] of rows, each of which has a lookup; it takes the place of their copy."""
        nothing = torch.zeros(CONTROL, dtype=torch.int64, device=self.rows.device)
        if len(self.slots_L):
            finite = torch.ones(1, dtype=torch.int32, device=self.rows.device)
            self._update(segments_of(self.slots_L), row_kernels.GRADIENT, nothing, finite)
        assert self.source_UK is not None
        return self.rows.read(0, len(self.source_UK))[0]

    def _update(
        self, segments: Segments, rule: int, control: Tensor, finite: Tensor, norms_L: Tensor | None = None
    ) -> None:
        rows, places, lookups = self.rows, self.places, len(self.slots_L)
        tiles = -(-lookups // row_kernels.TILE)
        came_TC, leave_TC = torch.empty(2, tiles, rows.width + 1, dtype=rows.dtype, device=rows.device)
        shape = self.shape | {
            "RULE": rule, "Z": rows.state_width, "STATE_STRIDE": rows.state_stride, "TILE": row_kernels.TILE,
            "CLIP": self.scale is not None,
        }  # fmt: skip
        numbers = came_TC if norms_L is None else norms_L, came_TC if self.scale is None else self.scale
        row_kernels.update_rows[grid(tiles, row_kernels.TILES)](
            segments.sorted_L, segments.order_L, self._or_none(places.x_L), self._or_none(places.sample_L),
            self._or_none(places.piece_L), *self.gradients, came_TC, leave_TC, finite, control, *numbers, rows.bases,
            rows.states, self.ids_S, lookups, places.samples, places.fields, self.gradients[0].stride(0),
            self.gradients[1].stride(0), **shape, **self._reads, BLOCK=row_kernels.TILES,
        )  # fmt: skip
        row_kernels.update_crossing[(tiles,)](
            segments.sorted_L, came_TC, leave_TC, finite, control, *numbers, rows.bases, rows.states, self.ids_S,
            lookups, **shape, SQUARES=self.squares, MANY=row_kernels.CROSSED,
        )  # fmt: skip

    def meet(
        self, segments: Segments, counts_S: Tensor, last_S: Tensor, control: Tensor, decay_P2: Tensor | None
    ) -> None:
        """Count the lookups of each row at a step, and let it catch up on the decay that it has missed."""
        row_kernels.meet_rows[grid(len(self.slots_L), row_kernels.ROWS)](
            segments.sorted_L, counts_S, last_S, control, self.rows.bases, self.ids_S,
            control if decay_P2 is None else decay_P2, 0 if decay_P2 is None else len(decay_P2), len(self.slots_L),
            **self.shape, DECAY=decay_P2 is not None, BLOCK=row_kernels.ROWS,
        )  # fmt: skip

    def least_bytes(self, segments: Segments) -> Tensor:
        """Bytes that pooling and update must move: each record read and written, each sum written and its gradient
        read, the slot and the order of each lookup."""
        places, width, size = self.places, self.rows.width, torch.finfo(self.rows.dtype).bits // 8
        before_L, sorted_L = segments.sorted_L[:-1], segments.sorted_L[1:]
        unique = (sorted_L != before_L).sum() + 1
        pooled = width + self.by_field * places.fields * (width - 1) + self.squares
        return unique * self.rows.slot_bytes * 2 + 2 * places.samples * pooled * size + len(self.slots_L) * 16


class _Pool(Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, pooled: Pooled) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.pooled = pooled
        return pooled.forward()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        pooled: Pooled = ctx.pooled
        d_linear_B, d_sums_Bk, *others = gradients
        # Slices of a wider gradient are read as they lie.
        d_sums_Bk = d_sums_Bk if d_sums_Bk.stride(1) == 1 else d_sums_Bk.contiguous()
        pooled.gradients = [d_linear_B, d_sums_Bk, *(gradient.contiguous() for gradient in others)]
        return None if pooled.source_UK is None else pooled.source_gradient(), None

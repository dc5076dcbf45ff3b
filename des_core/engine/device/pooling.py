"""Rows read, added up, and updated without a copy of them in between: what weights/pooling.py and optimizer.py do.

Forward reads rows by slot and hands operators the sums of each sample. Their gradients come back through autograd
to a ``Pooled``, which keeps them: the update waits until the loss is known to be finite, and then turns them into the
rows' gradients and applies the rule in one go.

Dims: B samples, O fields owned here, L lookups, U unique rows, P pieces, K numbers per row, k = K - 1 factors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from des_core.config import OptimizerConfig
from des_core.data.read.hashing import splitmix64
from des_core.engine.device import row_kernels
from des_core.engine.device.batch import Segments
from des_core.engine.device.rows import DeviceRows
from des_core.engine.device.support import sent
from des_core.engine.device.table import grid, kernel_type, seed_key, signed
from des_core.engine.weights.optimizer import rule_numbers

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
    """The lookups of a batch with their slots; after backward, the gradients of what was added up.

    ``offsets_OB`` [O B + 1] are the lookups of each field and sample, field by field.
    """

    rows: DeviceRows
    ids_S: Tensor
    """Ids in slot order."""
    slots_L: Tensor
    sample_L: Tensor
    piece_L: Tensor
    x_L: Tensor
    offsets_OB: Tensor
    samples: int
    fields: int
    by_field: bool
    squares: bool
    seed: int = 0
    gradients: list[Tensor] = field(default_factory=list)
    _sums_PK: Tensor | None = None

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

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sums [B, K], vectors [B, O, k] and squares [B]; the latter two are [.., 0, ..] and [0] where none asks."""
        rows = self.rows
        fields = self.fields if self.by_field else 0
        summed_BK = torch.empty(self.samples, rows.width, dtype=rows.dtype, device=rows.device)
        vectors_BOk = torch.empty(self.samples, fields, rows.width - 1, dtype=rows.dtype, device=rows.device)
        squares_B = torch.empty(self.samples if self.squares else 0, dtype=rows.dtype, device=rows.device)
        row_kernels.pool_forward[grid(self.samples, row_kernels.SAMPLES)](
            self.slots_L, self.x_L, self.offsets_OB, rows.bases, summed_BK, vectors_BOk, squares_B, self.samples,
            self.fields, **self.shape, BY_FIELD=self.by_field, SQUARES=self.squares, BLOCK=row_kernels.SAMPLES,
        )  # fmt: skip
        return summed_BK, vectors_BOk, squares_B

    def with_gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """As ``forward``; backward leaves the gradients here."""
        anchor = torch.zeros((), dtype=self.rows.dtype, device=self.rows.device, requires_grad=True)
        summed_BK, vectors_BOk, squares_B = _Pool.apply(anchor, self)  # type: ignore[no-untyped-call]
        return summed_BK, vectors_BOk, squares_B

    def row_squares(self, segments: Segments) -> Tensor:
        """The sum of squares [1] of all rows' gradients, of a backward that is done."""
        rows, lookups = self.rows, len(self.slots_L)
        if not self.gradients or not lookups:
            return torch.zeros(1, dtype=rows.dtype, device=rows.device)
        self._sums_PK = self._sum_gradients(segments)
        programs = grid(lookups, row_kernels.ROWS)
        squares = torch.zeros(programs[0], dtype=rows.dtype, device=rows.device)
        row_kernels.square_rows[programs](
            segments.first_U, self._sums_PK, segments.sizes_2, squares, K=rows.width, WIDE=self.shape["WIDE"],
            DTYPE=self.shape["DTYPE"], BLOCK=row_kernels.ROWS,
        )  # fmt: skip
        return squares.sum().reshape(1)

    def scale(self, factor: Tensor) -> None:
        """Multiply the rows' gradients, whose squares were summed before, by a number on the device."""
        if self._sums_PK is not None:
            # What lies behind the last piece is anything, and is never read.
            self._sums_PK.mul_(factor)

    def update(self, segments: Segments, config: OptimizerConfig, step: int, rate: float, finite: Tensor) -> None:
        """Apply a rule to the rows, unless ``finite`` (a number on the device) is zero."""
        if not self.gradients:
            return
        rows, lookups = self.rows, len(self.slots_L)
        sums_PK = self._sum_gradients(segments) if self._sums_PK is None else self._sums_PK
        self._sums_PK = None
        numbers = sent(torch.tensor(rule_numbers(config, rows.width, step, rate), dtype=rows.dtype), rows.device)
        row_kernels.update_rows[grid(lookups, row_kernels.ROWS)](
            segments.slots_U, segments.first_U, sums_PK, segments.sizes_2, finite, numbers, rows.bases, rows.states,
            self.ids_S, self._draw_key(step, 0x726F756E64), RULE=RULES[config.name], Z=rows.state_width,
            STATE_STRIDE=rows.state_stride, **self.shape, BLOCK=row_kernels.ROWS,
        )  # fmt: skip

    def _sum_gradients(self, segments: Segments) -> Tensor:
        """The gradient of each piece's row, by the lookups of the piece."""
        rows, lookups = self.rows, len(self.slots_L)
        pieces = lookups + lookups // row_kernels.PIECE + 1
        sums_PK = torch.empty(pieces, rows.width, dtype=rows.dtype, device=rows.device)
        row_kernels.sum_pieces[grid(pieces, row_kernels.ROWS)](
            segments.order_L, self.slots_L, self.x_L, self.sample_L, self.piece_L, segments.begin_P, segments.sizes_2,
            rows.bases, *self.gradients, sums_PK, self.fields, **self.shape, BY_FIELD=self.by_field,
            SQUARES=self.squares, BLOCK=row_kernels.ROWS,
        )  # fmt: skip
        return sums_PK

    def catch_up(self, segments: Segments, factors_U: Tensor, step: int) -> None:
        """Multiply the batch's rows by the decay that they have missed."""
        key = self._draw_key(step, 0x6465636179)
        row_kernels.decay_rows[grid(len(segments.slots_U), row_kernels.ROWS)](
            segments.slots_U, factors_U, segments.sizes_2, self.rows.bases, self.ids_S, key, **self.shape,
            BLOCK=row_kernels.ROWS,
        )  # fmt: skip

    def _draw_key(self, step: int, purpose: int) -> Tensor:
        """The key of a step's draws, by which rows of 16 bits are rounded."""
        word = int(splitmix64(np.uint64(seed_key(self.seed, purpose) ^ step)))
        return torch.full((1,), signed(word), dtype=torch.int64, device=self.rows.device)


class _Pool(Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, pooled: Pooled) -> tuple[Tensor, Tensor, Tensor]:
        ctx.pooled = pooled
        return pooled.forward()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        ctx.pooled.gradients = [gradient.contiguous() for gradient in gradients]
        return None, None

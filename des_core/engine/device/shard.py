"""What operators read of a batch whose rows stay on the device.

Dims: R rows sent, K numbers per row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from des_core.engine.device.batch import Places
from des_core.engine.device.pooling import Pooled
from des_core.engine.device.table import DeviceTable
from des_core.engine.operators import Shard


@dataclass(frozen=True)
class DeviceShard(Shard):
    """A shard whose sums the kernels form."""

    pooled: Pooled | None = None
    trains: bool = False

    @cached_property
    def _sums(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        pooled = self.pooled
        assert pooled is not None
        pooled.by_field, pooled.squares = self.by_field, self.squares
        return pooled.with_gradients() if self.trains else pooled.forward()

    @property
    def linear_B(self) -> Tensor:
        return self._sums[0]

    @property
    def sums_Bk(self) -> Tensor:
        return self._sums[1]

    @property
    def vectors_BOk(self) -> Tensor:
        return self._sums[2]

    @property
    def squares_B(self) -> Tensor:
        return self._sums[3]


@dataclass
class SentRows:
    """The rows that an owner sends to homes; after backward, their gradients."""

    table: DeviceTable
    slots: Tensor
    """Home by home, with more room than there are rows."""
    trains: bool
    missed: Callable[[Tensor], Tensor] | None = None
    """What rows of slots are multiplied by."""
    pooled: Pooled | None = None

    def gather(self, many: int) -> Tensor:
        """The rows [R, K]: the sums of a batch in which each sample looks up one."""
        slots_R = self.slots[:many]
        places = Places(many, 1)
        if self.missed is not None:
            places = replace(places, x_L=self.missed(slots_R))
        pooled = Pooled(self.table.rows, self.table.keys.ids, slots_R.int(), places, False, False)
        self.pooled = pooled
        linear_R, sums_Rk, _, _ = pooled.with_gradients() if self.trains else pooled.forward()
        return torch.cat([linear_R[:, None], sums_Rk], 1)


@dataclass(frozen=True)
class RowsShard(Shard):
    """A shard whose rows go to the homes that read them."""

    sent: SentRows | None = None

    def gather(self, many: int) -> Tensor:
        """The rows [R, K] that are sent."""
        assert self.sent is not None
        return self.sent.gather(many)


def bare(kind: type[Shard], samples: int, width: int, dtype: torch.dtype, fields_O: Tensor, inputs_BM: Tensor) -> Shard:
    """A shard without lists of lookups, of which only the kernels know."""
    device = fields_O.device
    none = torch.empty(0, dtype=torch.int64, device=device)
    return kind(
        rows_UK=torch.empty(0, width, dtype=dtype, device=device),
        inverse_L=none,
        sample_L=none,
        piece_L=none,
        x_L=torch.empty(0, dtype=dtype, device=device),
        samples=samples,
        fields_O=fields_O,
        inputs_BM=inputs_BM,
    )

"""A batch's lookups -> the shard that operators read; training, scoring and serving share it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from des_core.data.feed.batches import Lookups
from des_core.engine.operators import Shard

Array = np.ndarray[Any, np.dtype[Any]]


def known_only(lookups: Lookups, inverse_L: Array, slots_U: Array) -> Lookups:
    """The lookups, those of ids without a row with x = 0: they contribute zero and get no gradient."""
    unseen_U = slots_U < 0
    if not unseen_U.any():
        return lookups
    return replace(lookups, x=np.where(unseen_U[inverse_L], np.float32(0), lookups.x))


def shard_of(
    lookups: Lookups,
    inverse_L: Array,
    rows_UK: Tensor,
    samples: int,
    fields_O: Tensor,
    inputs_BM: Tensor,
    wide: int = 0,
) -> Shard:
    """A shard of a batch's lookups and the unique rows they read."""
    device = rows_UK.device
    return Shard(
        rows_UK=rows_UK,
        inverse_L=torch.from_numpy(inverse_L).to(device),
        sample_L=torch.from_numpy(lookups.sample).to(device),
        piece_L=torch.from_numpy(lookups.piece).to(device),
        x_L=torch.from_numpy(lookups.x).to(device, rows_UK.dtype),
        samples=samples,
        fields_O=fields_O,
        inputs_BM=inputs_BM,
        wide=wide,
    )

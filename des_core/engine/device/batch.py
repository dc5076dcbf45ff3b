"""A batch on a device: its lookups, the same lookups sorted by row, and what changes with the step.

Sorted once, they serve the counts, the gradients and the update. No number of a batch is known to the host.

Dims: B samples, O fields, L lookups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from des_core.config import OptimizerConfig
from des_core.data.read.hashing import splitmix64
from des_core.engine.weights.optimizer import rule_numbers

CONTROL = 20
"""Words of ``control``: step, keys of three draws, from 4 on the numbers of the rows' rule, from 10 on of the dense
weights' rule, by their bits in float64."""
ROWS_AT, DENSE_AT = 4, 10
COIN, ROUND, DECAY = 0x636F696E, 0x726F756E64, 0x6465636179
_WORD = (1 << 64) - 1


@dataclass(frozen=True)
class Places:
    """Where lookups belong. Without samples, fields and offsets they are plain: one for each field and sample."""

    samples: int
    fields: int
    sample_L: Tensor | None = None
    piece_L: Tensor | None = None
    x_L: Tensor | None = None
    """None: each is 1."""
    offsets_OB: Tensor | None = None
    """[O B + 1], the lookups of each field and sample, field by field."""

    @property
    def plain(self) -> bool:
        """Whether each field has one lookup for each sample."""
        return self.sample_L is None


class Segments(NamedTuple):
    """The lookups of each row, in their order."""

    sorted_L: Tensor
    """Slots of the lookups, sorted; first those without a row, -1."""
    order_L: Tensor
    """The lookups so sorted."""


def segments_of(slots_L: Tensor) -> Segments:
    """The lookups of slots, -1 without a row, by row."""
    return Segments(*torch.sort(slots_L, stable=True))


def signed(word: int) -> int:
    """A 64-bit word as torch holds it."""
    return word - (1 << 64) if word >> 63 else word


def seed_key(seed: int, purpose: int) -> int:
    """The key of a kind of counter draw, as ``first_values`` and coins have it on the CPU."""
    return int(splitmix64(np.uint64((seed ^ purpose) & _WORD)))


def control_of(
    seed: int, step: int, rule: OptimizerConfig | None = None, width: int = 1, rate: float = 0.0,
    dense: tuple[float, ...] = (),
) -> Tensor:  # fmt: skip
    """What kernels are told of a step, int64 [CONTROL] on the host: its number, the keys of its draws, and the numbers
    of both rules.

    Args:
        rule, width, rate: of the rows.
        dense: numbers of the dense weights' rule.
    """
    words = np.zeros(CONTROL, np.int64)
    words[0] = step
    for place, purpose in enumerate((COIN, ROUND, DECAY), 1):
        words[place] = signed(int(splitmix64(np.uint64(seed_key(seed, purpose) ^ step))))
    floats = words.view(np.float64)
    rows = rule_numbers(rule, width, step, rate) if rule is not None else ()
    floats[ROWS_AT : ROWS_AT + len(rows)] = rows
    floats[DENSE_AT : DENSE_AT + len(dense)] = dense
    return torch.from_numpy(words)

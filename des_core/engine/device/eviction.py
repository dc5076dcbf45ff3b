"""Which rows a budget lets go, on a device: the radix select of weights/eviction.py, counting bytes in torch.

Dims: S slots in use here.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from des_core.engine.weights.eviction import Total

_SIGN = -(1 << 63)


def beyond_budget(scores_S: Tensor, ids_S: Tensor, staying_S: Tensor, keep: int, total: Total) -> Tensor:
    """Which of the ``staying_S`` rows exceed a budget of ``keep`` over all workers: bool [S]; arguments as on the CPU.

    Only counts of bytes leave the device.
    """
    if total(np.array([int(staying_S.sum())]))[0] <= keep:
        return torch.zeros_like(staying_S)
    score, keep = _threshold(scores_S, 32, staying_S, keep, total)
    tied_S = staying_S & (scores_S == score)
    least, _ = _threshold(ids_S, 64, tied_S, keep, total)
    # Compared without a sign, as on the CPU.
    below_S = (ids_S ^ _SIGN) < least + _SIGN
    return staying_S & (scores_S < score) | tied_S & below_S


def _threshold(words_S: Tensor, bits: int, among_S: Tensor, keep: int, total: Total) -> tuple[int, int]:
    """The ``keep``-th largest unsigned word over the workers, and how many of those equal to it are within ``keep``."""
    word = 0
    for shift in range(bits - 8, -1, -8):
        counted_S = among_S
        if shift < bits - 8:
            higher = (1 << (bits - 8 - shift)) - 1
            counted_S = among_S & (((words_S >> (shift + 8)) & higher) == word)
        byte_S = ((words_S >> shift) & 255)[counted_S]
        counts = total(torch.bincount(byte_S, minlength=256).cpu().numpy())
        # above[b] rows have a byte of b or more.
        above = np.append(counts[::-1].cumsum()[::-1], 0)
        byte = int(np.flatnonzero(above >= keep)[-1])
        keep -= int(above[byte + 1])
        word = word << 8 | byte
    return word, keep

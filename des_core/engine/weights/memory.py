"""Memory for tables of any size: it grows in place, in huge pages, and is fetched ahead of its use.

An array is anonymous private pages. Pages never written cost nothing, so arrays grow by a quarter, and
mremap moves page tables, not bytes: 1 GB grows in a millisecond and is at no time held twice. In
2 MB pages a random read seldom misses the TLB too. On a device a tensor grows by copying.

Source: Linux, mremap(2) and madvise(2), MADV_HUGEPAGE.
Dims: S slots, W numbers per slot.
"""

from __future__ import annotations

import contextlib
import mmap
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

Array = np.ndarray[Any, np.dtype[Any]]

HUGE_PAGE = 2 << 20


class Memory:
    """A flat array of zeros that grows; take ``array`` anew after each ``grow``.

    Args:
        dtype: of its numbers.
    """

    def __init__(self, dtype: Any) -> None:
        self._dtype = np.dtype(dtype)
        self._pages = _pages(HUGE_PAGE)
        self.array: Array = np.frombuffer(self._pages, self._dtype)

    def held_bytes(self, length: int) -> int:
        """Memory taken when ``length`` numbers are in use."""
        return length * int(self._dtype.itemsize)

    def grow(self, length: int) -> None:
        """Make room for ``length`` numbers, the new ones zero."""
        if length <= len(self.array):
            return
        size = _whole(max(length * self._dtype.itemsize, len(self._pages) // 4 * 5))
        del self.array
        try:
            self._pages.resize(size)
        except BufferError:
            # Someone holds a view of the old pages, which must not move under it.
            pages = _pages(size)
            np.frombuffer(pages, np.uint8)[: len(self._pages)] = np.frombuffer(self._pages, np.uint8)
            self._pages = pages
        self.array = np.frombuffer(self._pages, self._dtype)

    def release(self, length: int) -> None:
        """Give back the pages after the first ``length`` numbers, which read as zero from then on."""
        start = _whole(length * self._dtype.itemsize)
        if start < len(self._pages):
            self._pages.madvise(mmap.MADV_DONTNEED, start, len(self._pages) - start)


class Rows:
    """A tensor [S, W] that grows: in place on the CPU, by copying elsewhere.

    Args:
        width: numbers per slot, W.
        device, dtype: of the tensor.
    """

    def __init__(self, width: int, device: torch.device, dtype: torch.dtype) -> None:
        self._width = width
        self._memory = Memory(torch.empty(0, dtype=dtype).numpy().dtype) if device.type == "cpu" else None
        self.tensor_SW = torch.empty(0, width, device=device, dtype=dtype)

    def grow(self, slots: int) -> None:
        """Make room for ``slots``; what the new ones hold is anything."""
        old_SW = self.tensor_SW
        if slots <= len(old_SW):
            return
        if self._memory is None:
            self.tensor_SW = old_SW.new_empty(max(slots, len(old_SW) // 4 * 5), self._width)
            self.tensor_SW[: len(old_SW)] = old_SW
            return
        del self.tensor_SW, old_SW
        self._memory.grow(slots * self._width)
        most = len(self._memory.array) // self._width if self._width else slots
        self.tensor_SW = torch.from_numpy(self._memory.array[: most * self._width]).view(most, self._width)

    def move(self, source: Array, target: Array) -> None:
        """Copy slots ``source`` over slots ``target``; no slot is in both."""
        # In pieces, so that moving half a table does not hold that half twice.
        for first in range(0, len(source), 1 << 18):
            piece = slice(first, first + (1 << 18))
            here, there = (torch.from_numpy(slots[piece]).to(self.tensor_SW.device) for slots in (source, target))
            self.tensor_SW.index_copy_(0, there, self.tensor_SW.index_select(0, here))

    def release(self, slots: int) -> None:
        """Give back memory after the first ``slots``, where that moves no row."""
        if self._memory is not None:
            self._memory.release(slots * self._width)

    def held_bytes(self, slots: int) -> int:
        """Memory taken when ``slots`` are in use."""
        held = slots if self._memory is not None else len(self.tensor_SW)
        return held * self._width * self.tensor_SW.element_size()


def _pages(size: int) -> mmap.mmap:
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A kernel without huge pages serves small ones.
    with contextlib.suppress(OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _whole(size: int) -> int:
    return -(-size // HUGE_PAGE) * HUGE_PAGE


def _prefetch(_: Any, array: Any, at: Any) -> Any:

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        view = context.make_array(signature.args[0])(context, builder, values[0])
        address = builder.bitcast(builder.gep(view.data, [values[1]]), cgutils.voidptr_t)
        word = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, word, word, word])
        instruction = builder.module.declare_intrinsic("llvm.prefetch", [cgutils.voidptr_t], kind)
        # To read, to keep in every cache, data rather than code.
        builder.call(instruction, [address, word(0), word(3), word(1)])
        return context.get_dummy_value()

    return types.void(array, at), build


prefetch: Any = intrinsic(_prefetch)
"""In compiled code, ``prefetch(array, at)`` starts to load the cache line of ``array[at]`` and does not wait."""

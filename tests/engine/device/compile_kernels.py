"""Compiles every kernel for a GPU without one, as it is called: prints how many variants, and those that fail.

Triton's compiler needs no device: its driver is replaced by one that names a target, and a launch by a compilation.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from des_core.config import OptimizerConfig, TableConfig

CAPABILITY = 90
SAMPLES, FIELDS = 64, 2
LOOKUPS = SAMPLES * FIELDS
compiled: set[str] = set()
failed: list[str] = []


class Target:
    """A driver that knows a target and no device."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_instead(self: Any, grid: Any) -> Callable[..., None]:
    """What ``kernel[grid]`` gives: a call that compiles for these arguments."""

    def call(*arguments: Any, **constants: Any) -> None:
        try:
            kernel = self.run(*arguments, grid=(1,), warmup=True, **constants)
            compiled.add(f"{self.fn.__name__} {kernel.hash}")
        except Exception as error:
            failed.append(f"{self.fn.__name__}: {type(error).__name__}: {str(error)[:500]}")

    return call


def ids(kind: str, settings: dict[str, Any]) -> None:
    """The kernels of the id side."""
    from des_core.engine.device import id_kernels
    from des_core.engine.device.batch import segments_of
    from des_core.engine.device.table import BLOCK, DeviceTable, grid

    L = torch.arange(LOOKUPS)
    piece, mine = L // SAMPLES, torch.ones(LOOKUPS, dtype=torch.int8)
    salts, owned = torch.zeros(FIELDS, dtype=torch.int64), torch.ones(FIELDS, 256, dtype=torch.int8)
    id_kernels.ids_of_keys[grid(LOOKUPS)](L, piece, salts, owned, L, mine, LOOKUPS, BUCKETS=256, BLOCK=BLOCK)
    dtype = torch.float64 if kind == "fp64" else torch.float32
    config = TableConfig(rows="bf16" if kind == "bf16" else "fp32", **settings)
    table = DeviceTable(17, 2, 0, 0.01, config, torch.device("cpu"), dtype, chunk_bits=10)
    table.look_up(L, mine, piece, torch.zeros(FIELDS, dtype=torch.int32), 1)
    table.keys.rebuild()
    segments_of(L).record(table.keys, 1)


def rows(kind: str, rule: str, width: int, by_field: bool, squares: bool) -> None:
    """The kernels of the rows."""
    from des_core.engine.device.batch import segments_of
    from des_core.engine.device.pooling import Pooled
    from des_core.engine.device.rows import DeviceRows
    from des_core.engine.weights.optimizer import state_width

    dtype = torch.float64 if kind == "fp64" else torch.float32
    store = DeviceRows(width, state_width(rule, width), torch.device("cpu"), dtype, 10, kind == "bf16")
    store.grow(LOOKUPS)
    L, offsets = torch.arange(LOOKUPS), torch.arange(LOOKUPS + 1)
    places = (L, L, L % SAMPLES, L // SAMPLES, torch.ones(LOOKUPS, dtype=dtype), offsets)
    pooled = Pooled(store, *places, SAMPLES, FIELDS, by_field, squares)
    sum(part.sum() for part in pooled.with_gradients()).backward()  # type: ignore[union-attr]
    segments = segments_of(L)
    config = OptimizerConfig(name=rule, learning_rate=0.05)  # type: ignore[arg-type]
    pooled.row_squares(segments)
    pooled.update(segments, config, 1, 0.1, torch.ones(1, dtype=torch.int32))
    pooled.catch_up(segments, torch.ones(LOOKUPS, dtype=torch.float64), 1)


def main() -> None:
    driver.set_active(Target())
    # No kernel runs, so that nothing fills what they would: zeros are places that exist.
    torch.empty, torch.empty_like = torch.zeros, torch.zeros_like
    JITFunction.__getitem__ = compile_instead
    kinds = ("fp32", "fp64", "bf16")
    for kind, settings in itertools.product(kinds, ({}, {"admit_count": 3})):
        ids(kind, settings)
    for kind, rule in itertools.product(kinds, ("sgd", "adagrad", "rowwise_adagrad", "adam", "ftrl")):
        rows(kind, rule, 17, True, True)
    for width, by_field, squares in ((1, False, False), (9, True, False), (33, False, True)):
        rows("fp32", "rowwise_adagrad", width, by_field, squares)
    print(f"compiled {len(compiled)} failed {len(failed)}", *failed, sep="\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

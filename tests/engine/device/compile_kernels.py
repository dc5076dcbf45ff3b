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


def ids(kind: str, settings: dict[str, Any], plain: bool) -> None:
    """The kernels of the id side."""
    from des_core.engine.device import id_kernels
    from des_core.engine.device.batch import control_of
    from des_core.engine.device.table import BLOCK, DeviceTable, grid

    L = torch.arange(LOOKUPS)
    piece, mine = L // SAMPLES, torch.ones(LOOKUPS, dtype=torch.int8)
    salts, owned = torch.zeros(FIELDS, dtype=torch.int64), torch.ones(FIELDS, 256, dtype=torch.int8)
    id_kernels.ids_of_keys[grid(LOOKUPS)](
        L, piece, salts, owned, L, mine, LOOKUPS, SAMPLES, BUCKETS=256, PLAIN=plain, BLOCK=BLOCK
    )
    dtype = torch.float64 if kind == "fp64" else torch.float32
    config = TableConfig(rows="bf16" if kind == "bf16" else "fp32", **settings)
    table = DeviceTable(17, 2, 0, 0.01, config, torch.device("cpu"), dtype, chunk_bits=10)
    table.make_room(LOOKUPS)
    tables = torch.zeros(FIELDS, dtype=torch.int32)
    table.look_up(L, mine, None if plain else piece, tables, control_of(0, 1), SAMPLES)
    table.keys.rebuild()


def rows(kind: str, rule: str, width: int, by_field: bool, squares: bool, plain: bool, decays: bool) -> None:
    """The kernels of the rows."""
    from des_core.engine.device.batch import Places, control_of, segments_of
    from des_core.engine.device.pooling import Pooled
    from des_core.engine.device.rows import DeviceRows
    from des_core.engine.weights.optimizer import state_width

    dtype = torch.float64 if kind == "fp64" else torch.float32
    store = DeviceRows(width, state_width(rule, width), torch.device("cpu"), dtype, 10, kind == "bf16")
    store.grow(LOOKUPS)
    L, counts = torch.arange(LOOKUPS), torch.zeros(LOOKUPS, dtype=torch.int32)
    places = Places(SAMPLES, FIELDS)
    if not plain:
        places = Places(SAMPLES, FIELDS, L % SAMPLES, L // SAMPLES, torch.ones(LOOKUPS), torch.arange(LOOKUPS + 1))
    pooled = Pooled(store, L, L.int(), places, by_field, squares)
    sum(part.sum() for part in pooled.with_gradients()).backward()  # type: ignore[union-attr]
    segments, control = segments_of(L.int()), control_of(0, 1)
    pooled.row_squares(segments, control)
    pooled.scale = torch.ones((), dtype=dtype) if decays else None
    pooled.update(segments, rule, control, torch.ones(1, dtype=torch.int32))
    pooled.meet(segments, counts, counts, control, torch.zeros(2, 2, dtype=torch.float64) if decays else None)


def homes(kind: str) -> None:
    """The kernels of a home that rows are brought to."""
    from des_core.engine.device.batch import Places
    from des_core.engine.device.pooling import Pooled
    from des_core.engine.device.rows import DeviceRows

    L = torch.arange(LOOKUPS)
    rows_UK = torch.zeros(LOOKUPS, 17, dtype=torch.float64 if kind == "fp64" else torch.float32, requires_grad=True)
    places = Places(SAMPLES, FIELDS, L % SAMPLES, L // SAMPLES, torch.ones(LOOKUPS), torch.arange(LOOKUPS + 1))
    pooled = Pooled(DeviceRows.of(rows_UK.detach()), L, L.int(), places, True, True, rows_UK)
    sum(part.sum() for part in pooled.with_gradients()).backward()  # type: ignore[union-attr]


def dense(kind: str, rule: str) -> None:
    """The kernels of the dense weights and the loss."""
    from des_core.engine.device import row_kernels
    from des_core.engine.device.batch import control_of
    from des_core.engine.device.dense_rule import DeviceDenseRule

    weight = torch.zeros(SAMPLES, dtype=torch.float64 if kind == "fp64" else torch.float32)
    finite = torch.ones(1, dtype=torch.int32)
    config = OptimizerConfig(name=rule, learning_rate=0.05)  # type: ignore[arg-type]
    DeviceDenseRule(config, [weight]).update((0,), weight, control_of(0, 1), finite)
    for rating in (False, True):
        row_kernels.losses[(1,)](*[weight] * 4, SAMPLES, weight, RATING=rating, BLOCK=256)
    row_kernels.judge[(1,)](weight, finite)


def main() -> None:
    driver.set_active(Target())
    # No kernel runs, so that nothing fills what they would: zeros are places that exist.
    torch.empty, torch.empty_like = torch.zeros, torch.zeros_like
    JITFunction.__getitem__ = compile_instead
    kinds = ("fp32", "fp64", "bf16")
    for kind, settings in itertools.product(kinds, ({}, {"admit_count": 3})):
        ids(kind, settings, plain=not settings)
    for kind, rule in itertools.product(kinds, ("sgd", "adagrad", "rowwise_adagrad", "adam", "ftrl")):
        # Each rule with and without places; decay with one of them.
        rows(kind, rule, 17, True, True, plain=kind != "fp64", decays=rule == "adam")
    for width, by_field, squares in ((1, False, False), (9, True, False), (33, False, True)):
        rows("fp32", "rowwise_adagrad", width, by_field, squares, plain=False, decays=False)
    for kind, rule in itertools.product(kinds[:2], ("sgd", "adagrad", "adam")):
        dense(kind, rule)
    homes("fp32")
    print(f"compiled {len(compiled)} failed {len(failed)}", *failed, sep="\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

"""What do a batch's rows cost on one core: pooling forward and backward, and each update rule, against torch's own ops?

    python benchmarks/update.py [--samples 4096] [--fields 26] [--factors 16] [--rows 1000000] [--zipf 1.05]

Every sample looks up one Zipf-drawn value of each field. Rows lie in the order in which a stream would have met them.
Prints key=value lines: median CPU ms of the kernels and of torch, taken in turns, and torch's over the kernels'
(median of the turns' ratios, with least and most). ``samples``: rows added up per sample with squares, as FM reads
them; ``fields``: per field as well, as DeepFM does; ``total``: gather, fields both ways and row-wise Adagrad.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, get_args

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import Tensor

from des_core.config import OptimizerConfig
from des_core.engine.weights.optimizer import apply, state_width, update_rows
from des_core.engine.weights.pooling import pool, reference
from des_core.log import format_event

RULES = get_args(OptimizerConfig.model_fields["name"].annotation)
EXTRAS = {"adamw": {"weight_decay": 0.01}, "ftrl": {"l1": 0.1}, "group_ftrl": {"l1": 0.1, "group_l1": 0.01}}


def draw_slots(samples: int, fields: int, rows: int, zipf: float) -> np.ndarray:
    """Slots [L] of the lookups, field by field, in the order of the samples."""
    draw = np.random.default_rng(0)
    weights = 1 / np.arange(1, rows // fields + 1) ** zipf
    shares = np.cumsum(weights) / weights.sum()
    values = [np.searchsorted(shares, draw.random(samples)) + len(shares) * field for field in range(fields)]
    # A value of weight p is first met after an exponential time of mean 1 / p.
    met = draw.exponential(1 / np.tile(weights, fields))
    slots = np.empty(len(met), np.int64)
    slots[np.argsort(met)] = np.arange(len(met))
    return slots[np.concatenate(values)]


def apply_by_torch(
    config: OptimizerConfig, rows_SK: Tensor, state_SZ: Tensor, slots_U: Tensor, gradient_UK: Tensor, step: int
) -> None:
    """Gather, update, scatter."""
    rows_UK, state_UZ = rows_SK.index_select(0, slots_U), state_SZ.index_select(0, slots_U)
    rows_UK, state_UZ = update_rows(config, rows_UK, gradient_UK, state_UZ, step, config.learning_rate)
    rows_SK.index_copy_(0, slots_U, rows_UK)
    state_SZ.index_copy_(0, slots_U, state_UZ)


def timed(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What the work returns, and its CPU ms."""
    started = time.process_time()
    answer = work(*arguments)
    return answer, 1e3 * (time.process_time() - started)


class Batch:
    """One batch's lookups and the store they read.

    Args:
        wanted: the command's arguments.
    """

    def __init__(self, wanted: argparse.Namespace) -> None:
        self.samples, self.fields = wanted.samples, wanted.fields
        slots_L = draw_slots(wanted.samples, wanted.fields, wanted.rows, wanted.zipf)
        slots_U, first_U, inverse_L = np.unique(slots_L, return_index=True, return_inverse=True)
        # The engine numbers unique rows as it first meets them.
        met_U = np.argsort(first_U)
        self.slots_U = torch.from_numpy(slots_U[met_U])
        self.inverse_L = torch.from_numpy(np.argsort(met_U)[inverse_L])
        self.sample_L = torch.arange(wanted.samples).repeat(wanted.fields)
        self.piece_L = torch.arange(wanted.fields).repeat_interleave(wanted.samples)
        self.x_L = torch.ones(len(self.sample_L))
        self.rows_SK = torch.randn(wanted.rows, 1 + wanted.factors) * 0.01
        self.gradient_UK = torch.randn(len(self.slots_U), 1 + wanted.factors) * 0.01

    def pooling(self, compute: Callable[..., Any], owned: int) -> list[float]:
        """CPU ms of gather, forward and backward."""
        rows_UK, gather_ms = timed(self.rows_SK.index_select, 0, self.slots_U)
        rows_UK.requires_grad_()
        places = (self.inverse_L, self.sample_L, self.piece_L, self.x_L)
        outputs, forward_ms = timed(compute, rows_UK, *places, self.samples, owned, True)
        outputs = [output for output in outputs if output.requires_grad and output.numel()]
        gradients = [torch.ones_like(output) for output in outputs]
        _, backward_ms = timed(torch.autograd.backward, outputs, gradients)
        return [gather_ms, forward_ms, backward_ms]


def measure(batch: Batch, rules: list[str], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Pairs of CPU ms, kernels' and torch's, of each piece of work; the first round compiles and is dropped."""
    pairs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    width = batch.rows_SK.shape[1]
    states = {rule: torch.zeros(len(batch.rows_SK), state_width(rule, width)) for rule in rules}
    for turn in range(rounds + 1):
        taken: dict[str, tuple[float, float]] = {}
        for work, owned in (("samples", 0), ("fields", batch.fields)):
            kernel, by_torch = (batch.pooling(compute, owned) for compute in (pool, reference))
            parts = ["gather", f"{work}_forward", f"{work}_backward"]
            taken |= zip(parts, zip(kernel, by_torch, strict=True), strict=True)
        for rule in rules:
            config = OptimizerConfig(name=rule, learning_rate=0.001, **EXTRAS.get(rule, {}))
            stored = batch.rows_SK, states[rule], batch.slots_U, batch.gradient_UK, turn + 1
            taken[rule] = (
                timed(apply, config, *stored, config.learning_rate)[1],
                timed(apply_by_torch, config, *stored)[1],
            )
        if "rowwise_adagrad" in rules:
            parts = [taken[part] for part in ("gather", "fields_forward", "fields_backward", "rowwise_adagrad")]
            taken["total"] = (sum(kernel for kernel, _ in parts), sum(by_torch for _, by_torch in parts))
        for work, pair in taken.items() if turn else ():
            pairs[work].append(pair)
    return pairs


def main() -> None:
    """Draw, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--fields", type=int, default=26)
    parser.add_argument("--factors", type=int, default=16)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the store, over all fields")
    parser.add_argument("--zipf", type=float, default=1.05, help="exponent of the values' frequencies")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    batch = Batch(wanted)
    for work, pairs in measure(batch, wanted.rules, wanted.rounds).items():
        kernel, by_torch = np.array(pairs).T
        # A clock that ticks too coarsely for tiny sizes must not divide by zero.
        ratios = by_torch / np.maximum(kernel, 1e-3)
        print(
            format_event(
                "benchmark",
                work=work,
                lookups=len(batch.x_L),
                unique_rows=len(batch.slots_U),
                kernel_cpu_ms=float(np.median(kernel)),
                torch_cpu_ms=float(np.median(by_torch)),
                ratio=float(np.median(ratios)),
                least=float(ratios.min()),
                most=float(ratios.max()),
            )
        )


if __name__ == "__main__":
    main()

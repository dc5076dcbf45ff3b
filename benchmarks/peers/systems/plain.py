"""The reference: the model as its equations stand, in double precision, on the rows that the steps read.

Dims: T steps, G samples, F fields, J lookups per field, L lookups, U unique rows, K numbers per row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from benchmarks.peers.case import GATE_STEPS, Case
from benchmarks.peers.head import Head, dense_rule, states, update_rows
from benchmarks.peers.store import dense_file, first_factors, read_home


class Plain:
    """One process, no tricks."""

    def __init__(self, case: Case, folder: Path) -> None:
        self._case = case
        rows_TFL, self._labels_TG = read_home(case, folder, 0, 1)
        seen = [torch.stack(list(batches)).unique() for batches in zip(*rows_TFL[:GATE_STEPS], strict=True)]
        starts = torch.tensor([0, *(len(rows) for rows in seen)]).cumsum(0)
        self._places_TFL = [
            torch.stack([starts[f] + torch.searchsorted(seen[f], rows_L) for f, rows_L in enumerate(rows_FL)])
            for rows_FL in rows_TFL[:GATE_STEPS]
        ]
        self._rows_UK = torch.zeros(int(starts[-1]), case.width, dtype=torch.float64)
        if case.vector:
            for field, rows in enumerate(seen):
                mine = slice(int(starts[field]), int(starts[field + 1]))
                self._rows_UK[mine, case.linear :] = first_factors(case, folder, field)[rows].double()
        self._state_UZ = torch.zeros(len(self._rows_UK), states(case), dtype=torch.float64)
        self._head = Head(case)
        self._head.load_state_dict(torch.load(dense_file(case, folder)))
        self._head.double()
        self._dense = dense_rule(self._head)

    def train(self, first: int, count: int) -> None:
        for step in range(first, first + count):
            self._rows_UK.requires_grad_()
            loss = binary_cross_entropy_with_logits(self._logits(step), self._labels_TG[step].double())
            self._dense.zero_grad()
            loss.backward()
            gradient_UK, self._rows_UK = self._rows_UK.grad, self._rows_UK.detach()
            read = self._places_TFL[step].unique()
            update_rows(self._case, self._rows_UK, self._state_UZ, read, gradient_UK[read])
            self._dense.step()

    @torch.no_grad()
    def score(self) -> Tensor:
        return self._logits(0)

    def _logits(self, step: int) -> Tensor:
        case, places_FL = self._case, self._places_TFL[step]
        looked_up = self._rows_UK[places_FL].view(case.fields, case.batch, case.bag, case.width)
        return self._head(looked_up.sum(2).transpose(0, 1))

    def facts(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


def build(case: Case, folder: Path, rank: int, workers: int) -> Plain:
    """The reference."""
    return Plain(case, folder)

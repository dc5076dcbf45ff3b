"""The models as plain torch writes them, from a sample's pooled rows that are all in one place.

    lr         bias + sum_f w_f
    fm         lr + 1/2 (|sum_f v_f|^2 - sum_f |v_f|^2)
    wide_deep  lr + tower(x_0)                                  x_0 = [v_1 .. v_F]
    deepfm     fm + tower(x_0)
    dcn        bias + x_L . w_out + tower(x_0),                 x_{l+1} = x_0 (x_l . w_l) + b_l + x_l
    dlrm       bias + tower(<v_i, v_j> for i < j)

    tower(x) = w . relu(.. relu(x W + c) ..)

Every peer runs this at each sample's home; the reference runs it on all samples, in double precision.
Dims: B samples, F fields, k factors, K numbers per row, D = F k.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from benchmarks.peers.case import CROSS_LAYERS, DEEP, DENSE_RATE, EPS, ROWS_RATE, Case


class Head(nn.Module):
    """Logits ``[B]`` from pooled rows ``[B, F, K]``, K = w (models with a linear term) and the factors."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self._model, self._linear = case.model, case.linear
        self.bias = nn.Parameter(torch.zeros(()))
        inputs = case.fields * case.vector
        if case.model == "dcn":
            self.cross_weights = nn.Parameter(torch.zeros(CROSS_LAYERS, inputs))
            self.cross_biases = nn.Parameter(torch.zeros(CROSS_LAYERS, inputs))
            self.cross_out = nn.Parameter(torch.zeros(inputs))
        if case.model == "dlrm":
            self.register_buffer("pairs_2P", torch.triu_indices(case.fields, case.fields, 1), persistent=False)
            inputs = case.fields * (case.fields - 1) // 2
        if case.model in DEEP:
            widths = [inputs, *case.hidden]
            self.layers = nn.ModuleList(nn.Linear(below, above) for below, above in itertools.pairwise(widths))
            self.output = nn.Linear(case.hidden[-1], 1, bias=False)

    def forward(self, rows_BFK: Tensor) -> Tensor:
        vectors_BFk = rows_BFK[:, :, self._linear :]
        logits_B = self.bias
        if self._linear:
            logits_B = logits_B + rows_BFK[:, :, 0].sum(1)
        if self._model in ("fm", "deepfm"):
            logits_B = logits_B + 0.5 * (vectors_BFk.sum(1).square() - vectors_BFk.square().sum(1)).sum(1)
        if self._model == "dcn":
            logits_B = logits_B + self._crossed(vectors_BFk.flatten(1)) @ self.cross_out
        if self._model in DEEP:
            x_B_ = self._products(vectors_BFk) if self._model == "dlrm" else vectors_BFk.flatten(1)
            for layer in self.layers:
                x_B_ = torch.relu(layer(x_B_))
            logits_B = logits_B + self.output(x_B_)[:, 0]
        return logits_B

    def _crossed(self, x0_BD: Tensor) -> Tensor:
        x_BD = x0_BD
        for w_D, b_D in zip(self.cross_weights, self.cross_biases, strict=True):
            x_BD = x0_BD * (x_BD @ w_D)[:, None] + b_D + x_BD
        return x_BD

    def _products(self, vectors_BFk: Tensor) -> Tensor:
        rows, columns = self.get_buffer("pairs_2P")
        return (vectors_BFk @ vectors_BFk.mT)[:, rows, columns]


def dense_rule(head: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of dense weights."""
    return torch.optim.Adagrad(head.parameters(), lr=DENSE_RATE, eps=EPS)


@torch.no_grad()
def update_rows(case: Case, rows_RK: Tensor, state_RZ: Tensor, places_U: Tensor, gradient_UK: Tensor) -> None:
    """Adagrad on rows ``places_U``, in place: one state per number, or one for w and one for v_1..v_k."""
    square_UZ = gradient_UK.square()
    if case.rule == "rowwise_adagrad":
        square_UZ = torch.cat([part.mean(1, keepdim=True) for part in square_UZ.split(_widths(case), 1)], 1)
    state_UZ = state_RZ.index_select(0, places_U) + square_UZ
    state_RZ.index_copy_(0, places_U, state_UZ)
    step_UZ = ROWS_RATE / (state_UZ.sqrt() + EPS)
    if case.rule == "rowwise_adagrad":
        step_UZ = step_UZ.repeat_interleave(torch.tensor(_widths(case)), 1)
    rows_RK.index_add_(0, places_U, step_UZ * gradient_UK, alpha=-1)


def states(case: Case) -> int:
    """Numbers of optimizer state per row."""
    return len(case.parts) if case.rule == "rowwise_adagrad" else case.width


def _widths(case: Case) -> list[int]:
    return [part.width for part in case.parts]

"""Blocks of MaskNet: layers whose input is multiplied by a mask made from the sample itself.

    mask = relu(x_0 W_a + a) W_m + m                                            as wide as what it masks
    block(v) = relu(norm((mask * v) W_o))                                       norm: layer norm

parallel: every block masks e = [norm(e_1) .. norm(e_F) | dense inputs]; their outputs stand side by side.
stacked (serial): the first block masks e, each other one the block before it.

Layer norm is no sum over fields: all vectors of a sample must be in one place. It takes a vector's length away, so a
number that scales its own row (a numeric field with rows) is known by its sign alone: bucket it, or make it a dense
input, which is not normed.

Source: Wang, She and Zhang, "MaskNet", DLP-KDD 2021.
Dims: B samples, F fields, M dense inputs, k factors, D = F k + M, a units of a mask's hidden layer, m units of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from des_core.engine.operators import Operator, x0_of


class MaskBlock(nn.Module):
    """One block: ``[B, v] -> [B, m]``."""

    def __init__(self, whole: int, masked: int, ratio: float, units: int) -> None:
        super().__init__()
        between = max(1, round(ratio * masked))
        self.aggregate, self.project = nn.Linear(whole, between), nn.Linear(between, masked)
        self.output, self.norm = nn.Linear(masked, units, bias=False), nn.LayerNorm(units)

    def forward(self, x0_BD: Tensor, v_Bv: Tensor) -> Tensor:
        mask_Bv = self.project(torch.relu(self.aggregate(x0_BD)))
        return torch.relu(self.norm(self.output(mask_Bv * v_Bv)))


class MaskBlocks(Operator):
    """The blocks of a model.

    Args:
        fields, factors, inputs: F, k and M.
        blocks: how many.
        units: outputs of each, m.
        ratio: a mask's hidden units by the width of what it masks.
        stacked: one on top of the other.
    """

    kinds = ("gather",)

    def __init__(
        self, fields: int, factors: int, inputs: int, blocks: int, units: int, ratio: float, stacked: bool
    ) -> None:
        super().__init__()
        self._stacked = stacked
        self.gain_Fk, self.shift_Fk = (nn.Parameter(fill(fields, factors)) for fill in (torch.ones, torch.zeros))
        whole = fields * factors + inputs
        self.blocks = nn.ModuleList(
            MaskBlock(whole, units if stacked and number else whole, ratio, units) for number in range(blocks)
        )
        self.width = units if stacked else blocks * units

    def collect(self, vectors_BFk: Tensor, inputs_BM: Tensor, rest_BR: Tensor) -> Tensor:
        x0_BD = x0_of(vectors_BFk, inputs_BM)
        normed_BFk = layer_norm(vectors_BFk, vectors_BFk.shape[2:]) * self.gain_Fk + self.shift_Fk
        e_BD = x0_of(normed_BFk, inputs_BM)
        if not self._stacked:
            return torch.cat([block(x0_BD, e_BD) for block in self.blocks], 1)
        for block in self.blocks:
            e_BD = block(x0_BD, e_BD)
        return e_BD


def reference(x_BD: Tensor) -> Tensor:
    """Layer norm ``[B, D]`` without gain and shift, as its paper writes it."""
    centred_BD = x_BD - x_BD.mean(1, keepdim=True)
    return centred_BD / (centred_BD.square().mean(1, keepdim=True) + 1e-5).sqrt()

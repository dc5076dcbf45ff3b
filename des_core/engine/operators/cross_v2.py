"""Cross network, second version, split by field where its weights have low rank.

    x_{l+1} = x_0 * c_l + x_l,      c_l = U_l (V_l^T x_l) + b_l        (* by element)

Each layer needs r global numbers, V_l^T x_l, a sum over fields: every worker then computes its own fields'
slice of c_l and of x_{l+1}, which is linear in its share of x_0, so a field cut in two is no special case.
r numbers per layer are summed over all workers (an all-reduce each way: dc reaches every owner), and at
last the layer on top, x_L W_out, h numbers, travels home. With full rank, c_l = x_l W_l + b_l needs the whole
x_l in one place: the field vectors are brought home.

Gated, as in GDCN, x_0 is multiplied by c_l and by a gate of each element as well:

    x_{l+1} = x_0 * c_l * sigmoid(g_l) + x_l,      g_l = U'_l (V'_l^T x_l)

The gate's r numbers of a layer travel beside the other r, and a slice of x_{l+1} is still linear in its share of x_0.

Sources: Wang et al., "DCN V2: Improved Deep & Cross Network", WWW 2021; Wang et al., "Towards Deeper, Lighter and
Interpretable Cross Network for CTR Prediction", CIKM 2023.
Dims: B samples, F fields, k factors, M dense inputs, D = F k + M, r rank, h outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from des_core.engine.operators import Operator, Projection, Shard, x0_of


class CrossNetworkV2(Operator):
    """Crosses of bounded degree with matrix weights, and the linear layer on top of them.

    Args:
        fields, factors, inputs: F, k and M.
        layers: cross layers.
        rank: of U_l and V_l, r; 0: full.
        outputs: width of the linear layer on top, h.
        bias: whether that layer has one.
        line: name in the ledger of what is summed inside.
        gated: whether each layer has a gate.
    """

    def __init__(
        self,
        fields: int,
        factors: int,
        inputs: int,
        layers: int,
        rank: int,
        outputs: int,
        bias: bool,
        line: str,
        gated: bool = False,
    ) -> None:
        super().__init__()
        self.width, self._line, self._gated, self._rank = outputs, line, gated, rank
        whole = 2 if gated else 1
        self.kinds = ("sum", "gather") if rank else ("gather",)
        self.inner = (whole * rank,) * layers if rank else ()
        self.top = Projection(fields, factors, inputs, outputs)
        self.bias_h = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.shifts = nn.ModuleList(Projection(fields, factors, inputs, 1) for _ in range(layers))
        for shift in self.shifts.parameters():
            nn.init.zeros_(shift)
        width = fields * factors + inputs
        if rank:
            # The gate's columns stand beside the others.
            self.down = nn.ModuleList(Projection(fields, factors, inputs, whole * rank) for _ in range(layers))
            self.up = nn.ModuleList(Projection(fields, factors, inputs, whole * rank) for _ in range(layers))
        else:
            self.full = nn.ModuleList(nn.Linear(width, whole * width, bias=False) for _ in range(layers))

    def partial(self, shard: Shard) -> Tensor:
        x0 = x0_of(shard.vectors_BOk, shard.inputs_BM)
        return self._cross(x0, lambda weight: weight.owned(shard.fields_O), shard.total)

    def collect(self, vectors_BFk: Tensor, inputs_BM: Tensor, rest_BR: Tensor) -> Tensor:
        return self._cross(x0_of(vectors_BFk, inputs_BM), lambda weight: weight.weight_DP, lambda line, part: part)

    def finish(self, total_BP: Tensor) -> Tensor:
        """``[B, h] -> [B, h]``"""
        return total_BP if self.bias_h is None else total_BP + self.bias_h

    def _cross(
        self, x0_BC: Tensor, slice_of: Callable[[Any], Tensor], total: Callable[[str, Tensor], Tensor]
    ) -> Tensor:
        """x_L W_out [B, h] of the C columns of x_0 that ``slice_of`` takes of a weight's D."""
        x_BC = x0_BC
        for layer, shift in enumerate(self.shifts):
            if self.inner:
                down_Br = total(self._line, x_BC @ slice_of(self.down[layer]))
                parts = zip(down_Br.split(self._rank, 1), slice_of(self.up[layer]).split(self._rank, 1), strict=True)
                c_BC, *gate = [part_Br @ up_Cr.T for part_Br, up_Cr in parts]
            else:
                c_BC, *gate = self.full[layer](x_BC).split(x_BC.shape[1], 1)
            crossed_BC = x0_BC * (c_BC + slice_of(shift)[:, 0])
            x_BC = (crossed_BC * torch.sigmoid(gate[0]) if gate else crossed_BC) + x_BC
        return x_BC @ slice_of(self.top)


def reference(x0_BD: Tensor, down_LDr: Tensor, up_LDr: Tensor, bias_LD: Tensor, out_Dh: Tensor) -> Tensor:
    """The network ``[B, h]`` as published, with the product U V^T written out."""
    x_BD = x0_BD
    for down_Dr, up_Dr, b_D in zip(down_LDr, up_LDr, bias_LD, strict=True):
        x_BD = x0_BD * (x_BD @ (up_Dr @ down_Dr.T).T + b_D) + x_BD
    return x_BD @ out_Dh


def gated_reference(x0_BD: Tensor, full_LDD: Tensor, gate_LDD: Tensor, bias_LD: Tensor, out_Dh: Tensor) -> Tensor:
    """The gated network ``[B, h]`` as published, with whole matrices."""
    x_BD = x0_BD
    for full_DD, gate_DD, b_D in zip(full_LDD, gate_LDD, bias_LD, strict=True):
        x_BD = x0_BD * (x_BD @ full_DD.T + b_D) * torch.sigmoid(x_BD @ gate_DD.T) + x_BD
    return x_BD @ out_Dh

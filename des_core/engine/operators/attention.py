"""Multi-head self-attention over the fields of a sample, as in AutoInt.

    e_f' = relu( concat_h sum_g softmax_g(<Q_h e_f, K_h e_g>) V_h e_g  +  R e_f )        per layer

A dense input is one more field, its vector the input times a learned one. No sum over fields: all vectors of
a sample must be in one place.

Source: Song et al., "AutoInt: Automatic Feature Interaction Learning via Self-Attentive Neural Networks", CIKM 2019.
Dims: B samples, F fields, M dense inputs, V = F + M vectors, k factors, H heads, a numbers per head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import softmax

from des_core.engine.operators import Operator


class FieldAttention(Operator):
    """Field vectors after some layers of attention, and the linear layer on top of them.

    Args:
        fields, factors, inputs: F, k and M.
        layers, heads, width: attention layers, heads of each, numbers per head.
    """

    kinds = ("gather",)

    def __init__(self, fields: int, factors: int, inputs: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self._heads = heads
        self.inputs_Mk = nn.Parameter(torch.randn(inputs, factors) * factors**-0.5) if inputs else None
        below = [factors] + [heads * width] * (layers - 1)
        # Queries, keys, values and the residual of a layer are one product.
        self.layers = nn.ModuleList(nn.Linear(size, 4 * heads * width, bias=False) for size in below)
        self.width = (fields + inputs) * heads * width
        self.output = nn.Linear(self.width, 1, bias=False)

    def collect(self, vectors_BFk: Tensor, inputs_BM: Tensor, rest_BR: Tensor) -> Tensor:
        e_BVk = vectors_BFk
        if self.inputs_Mk is not None:
            e_BVk = torch.cat([e_BVk, inputs_BM[:, :, None] * self.inputs_Mk], 1)
        for layer in self.layers:
            queries, keys, values, residual = layer(e_BVk).chunk(4, -1)
            q_BHVa, k_BHVa, v_BHVa = (
                t.unflatten(-1, (self._heads, -1)).transpose(1, 2) for t in (queries, keys, values)
            )
            mixed_BHVa = softmax(q_BHVa @ k_BHVa.mT, -1) @ v_BHVa
            e_BVk = torch.relu(mixed_BHVa.transpose(1, 2).flatten(2) + residual)
        return e_BVk.flatten(1)

    def finish(self, total_BP: Tensor) -> Tensor:
        """``[B, V H a] -> [B]``"""
        out_B: Tensor = self.output(total_BP)[:, 0]
        return out_B


def reference(e_BVk: Tensor, weight_Ck: Tensor, heads: int) -> Tensor:
    """One layer ``[B, V, H a]``, head by head and field by field; C = 4 H a."""
    queries, keys, values, residual = weight_Ck.chunk(4)
    outputs = []
    for f in range(e_BVk.shape[1]):
        mixed = []
        for q, k, v in zip(queries.chunk(heads), keys.chunk(heads), values.chunk(heads), strict=True):
            scores_BV = torch.stack([((e_BVk[:, f] @ q.T) * (e_g @ k.T)).sum(1) for e_g in e_BVk.unbind(1)], 1)
            share_BV = torch.exp(scores_BV) / torch.exp(scores_BV).sum(1, keepdim=True)
            mixed.append((share_BV[:, :, None] * (e_BVk @ v.T)).sum(1))
        outputs.append(torch.relu(torch.cat(mixed, 1) + e_BVk[:, f] @ residual.T))
    return torch.stack(outputs, 1)

"""Bilinear products between all pairs of field vectors, as they are and as a squeeze-excitation network weighs them.

    z_f = mean over factors of e_f,      a = relu(relu(z W_1) W_2),      v_f = a_f e_f
    output = [ (e_i W_i) * e_j | (v_i W_i) * v_j   for i < j ]            (* by element; W_i: one matrix per field)

A dense input is one more field, its vector the input times a learned one. The pairs are no sum over fields: all
vectors of a sample must be in one place. The output is wide, V (V - 1) k numbers.

Source: Huang, Zhang and Zhang, "FiBiNET: Combining Feature Importance and Bilinear Feature Interaction for
Click-Through Rate Prediction", RecSys 2019 (Field-Each).
Dims: B samples, F fields, M dense inputs, V = F + M vectors, k factors, P = V (V - 1) k.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from des_core.engine.operators import Operator, Shard


class BilinearProducts(Operator):
    """The products, and the linear term of the model, whose number travels alone.

    Args:
        fields, factors, inputs: F, k and M.
        reduction: fields per unit of the squeezed layer.
    """

    kinds = ("gather",)
    rest = 1
    linear = True

    def __init__(self, fields: int, factors: int, inputs: int, reduction: int) -> None:
        super().__init__()
        vectors = fields + inputs
        squeezed = max(1, vectors // reduction)
        self.inputs_Mk = nn.Parameter(torch.randn(inputs, factors) * factors**-0.5) if inputs else None
        self.squeeze, self.excite = (
            nn.Linear(vectors, squeezed, bias=False),
            nn.Linear(squeezed, vectors, bias=False),
        )
        self.weight_Vkk = nn.Parameter(torch.empty(vectors, factors, factors))
        nn.init.xavier_normal_(self.weight_Vkk)
        self.width = vectors * (vectors - 1) * factors + 1
        self.register_buffer("_pairs_2P", torch.triu_indices(vectors, vectors, 1), persistent=False)

    def partial_rest(self, shard: Shard) -> Tensor:
        return shard.linear_B[:, None]

    def collect(self, vectors_BFk: Tensor, inputs_BM: Tensor, rest_BR: Tensor) -> Tensor:
        e_BVk = vectors_BFk
        if self.inputs_Mk is not None:
            e_BVk = torch.cat([e_BVk, inputs_BM[:, :, None] * self.inputs_Mk], 1)
        weights_BV = torch.relu(self.excite(torch.relu(self.squeeze(e_BVk.mean(2)))))
        return torch.cat([rest_BR, self._products(e_BVk), self._products(weights_BV[:, :, None] * e_BVk)], 1)

    def _products(self, e_BVk: Tensor) -> Tensor:
        left, right = self.get_buffer("_pairs_2P")
        turned_BVk = torch.einsum("bvk,vkj->bvj", e_BVk, self.weight_Vkk)
        return (turned_BVk[:, left] * e_BVk[:, right]).flatten(1)


def reference(e_BVk: Tensor, weight_Vkk: Tensor) -> Tensor:
    """The products ``[B, V (V - 1) k / 2]`` pair by pair."""
    count = e_BVk.shape[1]
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    return torch.cat([(e_BVk[:, i] @ weight_Vkk[i]) * e_BVk[:, j] for i, j in pairs], 1)

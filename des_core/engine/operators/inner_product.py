"""Inner products between all pairs of field vectors, and the dense inputs' own vector, as in DLRM.

    z = bottom(dense inputs),      output = [z | <u_i, u_j> for i < j],      u = field vectors and z

No sum over fields: all vectors of a sample must be in one place.

Source: Naumov et al., "Deep Learning Recommendation Model for Personalization and Recommendation Systems", 2019.
Dims: B samples, F fields, M dense inputs, k factors, V = F + 1 vectors (F without dense inputs).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from des_core.engine.operators import Operator


class InnerProducts(Operator):
    """All pairs' inner products.

    Args:
        fields, factors, inputs: F, k and M.
        bottom: widths of the layers under the dense inputs; one of width k follows.
    """

    kinds = ("gather",)

    def __init__(self, fields: int, factors: int, inputs: int, bottom: Sequence[int]) -> None:
        super().__init__()
        self.bottom = nn.Sequential()
        widths = [inputs, *bottom, factors] if inputs else []
        for below, above in zip(widths, widths[1:], strict=False):
            self.bottom.extend([nn.Linear(below, above), nn.ReLU()])
        vectors = fields + bool(inputs)
        self.width = vectors * (vectors - 1) // 2 + (factors if inputs else 0)
        self.register_buffer("_pairs_2P", torch.triu_indices(vectors, vectors, 1), persistent=False)

    def collect(self, vectors_BFk: Tensor, inputs_BM: Tensor, rest_BR: Tensor) -> Tensor:
        dense = [self.bottom(inputs_BM)] if len(self.bottom) else []
        vectors_BVk = torch.cat([vectors_BFk, *(z_Bk[:, None] for z_Bk in dense)], 1)
        products_BVV = vectors_BVk @ vectors_BVk.mT
        rows, columns = self.get_buffer("_pairs_2P")
        return torch.cat([*dense, products_BVV[:, rows, columns]], 1)


def reference(vectors_BVk: Tensor) -> Tensor:
    """The products ``[B, V (V - 1) / 2]`` one by one."""
    count = vectors_BVk.shape[1]
    return torch.stack(
        [(vectors_BVk[:, i] * vectors_BVk[:, j]).sum(1) for i in range(count) for j in range(i + 1, count)], 1
    )

"""FiBiNET: logit = bias + linear term + tower(bilinear products of the field vectors, plain and weighed)
(Huang et al., RecSys 2019).

Of FiBiNET and xDeepFM the first has the better published record where both were tuned alike: AUC 0.7953 against 0.7933
on Avazu with 16 factors (Zhu et al., "Open Benchmarking for Click-Through Rate Prediction", CIKM 2021, and its data).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from des_core.config import ModelConfig
from des_core.engine.dense_layers import Home, Tower
from des_core.engine.models import Model, deep_part
from des_core.engine.operators.bilinear import BilinearProducts


class BesideLinear(nn.Module):
    """The first number as it is, the others through a tower; ``[B, 1 + P] -> [B]``."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, x_BP: Tensor, home: Home) -> Tensor:
        out_B: Tensor = x_BP[:, 0] + self.tower(x_BP[:, 1:], home)
        return out_B


def build(config: ModelConfig, fields: Sequence[str], inputs: int) -> Model:
    """The model."""
    products = BilinearProducts(len(fields), config.factors, inputs, config.senet_reduction)
    tower = BesideLinear(deep_part(config, products.width - 1))
    return Model({"products": products}, config.factors, {"products": tower}, inputs)

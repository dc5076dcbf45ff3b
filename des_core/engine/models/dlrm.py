"""DLRM: logit = bias + tower([z | inner products]), z from the dense inputs (Naumov et al., 2019)."""

from __future__ import annotations

from collections.abc import Sequence

from des_core.config import ModelConfig
from des_core.engine.models import Model, deep_part
from des_core.engine.operators.inner_product import InnerProducts


def build(config: ModelConfig, fields: Sequence[str], inputs: int) -> Model:
    """The model."""
    products = InnerProducts(len(fields), config.factors, inputs, config.bottom)
    return Model({"products": products}, config.factors, {"products": deep_part(config, products.width)})

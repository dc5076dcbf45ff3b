"""Logistic regression: logit = bias + sum_j w_j x_j."""

from __future__ import annotations

from collections.abc import Sequence

from des_core.config import ModelConfig
from des_core.engine.models import Model
from des_core.engine.operators.lr import Linear


def build(config: ModelConfig, fields: Sequence[str], inputs: int) -> Model:
    """The model; rows hold one number."""
    return Model({"lr": Linear()}, factors=0, inputs=inputs)

"""Factorization machine: logit = bias + linear term + pairwise interactions (Rendle, ICDM 2010)."""

from __future__ import annotations

from collections.abc import Sequence

from des_core.config import ModelConfig
from des_core.engine.models import Model
from des_core.engine.operators.fm import FactorizationMachine


def build(config: ModelConfig, fields: Sequence[str], inputs: int) -> Model:
    """The model; the linear term travels inside the fm operator."""
    return Model({"fm": FactorizationMachine(config.factors)}, config.factors, inputs=inputs)

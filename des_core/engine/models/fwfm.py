"""Field-weighted factorization machine: logit = bias + linear term + weighted pairs (Pan et al., WWW 2018)."""

from __future__ import annotations

from collections.abc import Sequence

from des_core.config import ModelConfig
from des_core.engine.models import Model
from des_core.engine.operators.fwfm import FieldWeightedMachine


def build(config: ModelConfig, fields: Sequence[str], inputs: int) -> Model:
    """The model."""
    return Model({"fwfm": FieldWeightedMachine(len(fields))}, config.factors, inputs=inputs)

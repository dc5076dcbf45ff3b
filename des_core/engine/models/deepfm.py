"""DeepFM: logit = bias + FM + tower(embeddings), over the same rows (Guo et al., IJCAI 2017)."""

from __future__ import annotations

from collections.abc import Sequence

from des_core.config import ModelConfig
from des_core.engine.models import Model, deep_part
from des_core.engine.operators.fc import FullyConnected
from des_core.engine.operators.fm import FactorizationMachine


def build(config: ModelConfig, fields: Sequence[str], inputs: int) -> Model:
    """The model."""
    first = FullyConnected(len(fields), config.factors, inputs, config.hidden[0], bias=not config.batch_norm)
    operators = {"fm": FactorizationMachine(config.factors), "fc": first}
    return Model(operators, config.factors, {"fc": deep_part(config)}, inputs)

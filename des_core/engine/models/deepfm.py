"""DeepFM: logit = bias + FM + tower(embeddings), over the same rows (Guo et al., IJCAI 2017)."""

from __future__ import annotations

from des_core.config import ModelConfig
from des_core.engine.dense import Tower
from des_core.engine.models import Model
from des_core.engine.operators.fc import FullyConnected
from des_core.engine.operators.fm import FactorizationMachine


def build(config: ModelConfig, fields: int) -> Model:
    """The model."""
    first = FullyConnected(fields, config.factors, config.hidden[0], bias=not config.batch_norm)
    tower = Tower(config.hidden, config.dropout, config.batch_norm)
    return Model({"fm": FactorizationMachine(config.factors), "fc": first}, config.factors, tower)

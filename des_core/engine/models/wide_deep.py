"""Wide and Deep: logit = bias + linear term + tower(embeddings) (Cheng et al., DLRS 2016).

The wide part is linear in the fields; crosses are the deep part's work here.
"""

from __future__ import annotations

from des_core.config import ModelConfig
from des_core.engine.dense import Tower
from des_core.engine.models import Model
from des_core.engine.operators.fc import FullyConnected
from des_core.engine.operators.lr import Linear


def build(config: ModelConfig, fields: int) -> Model:
    """The model."""
    first = FullyConnected(fields, config.factors, config.hidden[0], bias=not config.batch_norm)
    tower = Tower(config.hidden, config.dropout, config.batch_norm)
    return Model({"lr": Linear(), "fc": first}, config.factors, tower)

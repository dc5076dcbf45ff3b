"""Wide and Deep: logit = bias + linear term + tower(embeddings) (Cheng et al., DLRS 2016).

The wide part is linear in the fields; crosses are the deep part's work here.
"""

from __future__ import annotations

from collections.abc import Sequence

from des_core.config import ModelConfig
from des_core.engine.models import Model, deep_part
from des_core.engine.operators.fc import FullyConnected
from des_core.engine.operators.lr import Linear


def build(config: ModelConfig, fields: Sequence[str], inputs: int) -> Model:
    """The model."""
    first = FullyConnected(len(fields), config.factors, inputs, config.hidden[0], bias=not config.batch_norm)
    return Model({"lr": Linear(), "fc": first}, config.factors, {"fc": deep_part(config)}, inputs)

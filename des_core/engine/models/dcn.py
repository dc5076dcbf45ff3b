"""Deep & Cross Network: a cross network beside a deep part, or under it (Wang et al., ADKDD 2017).

parallel: logit = bias + x_L . w_out + tower(x_0)          stacked: logit = bias + tower(x_L)
"""

from __future__ import annotations

from collections.abc import Sequence

from des_core.config import ModelConfig
from des_core.engine.models import Model, deep_part
from des_core.engine.operators import Operator
from des_core.engine.operators.cross import CrossNetwork
from des_core.engine.operators.fc import FullyConnected


def build(config: ModelConfig, fields: Sequence[str], inputs: int) -> Model:
    """The model."""
    k, layers, units = config.factors, config.cross_layers, config.hidden[0]
    if config.structure == "stacked":
        cross = CrossNetwork(len(fields), k, inputs, layers, units, offset=not config.batch_norm)
        return Model({"cross": cross}, k, {"cross": deep_part(config)})
    operators: dict[str, Operator] = {
        "cross": CrossNetwork(len(fields), k, inputs, layers, 1),
        "fc": FullyConnected(len(fields), k, inputs, units, bias=not config.batch_norm),
    }
    return Model(operators, k, {"fc": deep_part(config)})

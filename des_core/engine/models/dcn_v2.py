"""DCN V2: a cross network with matrix weights beside a deep part, or under it (Wang et al., WWW 2021).

parallel: logit = bias + x_L . w_out + tower(x_0)          stacked: logit = bias + tower(x_L)
"""

from __future__ import annotations

from collections.abc import Sequence

from des_core.config import ModelConfig
from des_core.engine.models import Model, deep_part
from des_core.engine.operators import Operator
from des_core.engine.operators.cross_v2 import CrossNetworkV2
from des_core.engine.operators.fc import FullyConnected


def build(config: ModelConfig, fields: Sequence[str], inputs: int, gated: bool = False) -> Model:
    """The model.

    Args:
        gated: whether the cross layers have gates (gdcn.py).
    """
    k, units = config.factors, config.hidden[0]
    stacked = config.structure == "stacked"
    cross = CrossNetworkV2(
        len(fields),
        k,
        inputs,
        config.cross_layers,
        config.cross_rank,
        outputs=units if stacked else 1,
        bias=stacked and not config.batch_norm,
        line="cross",
        gated=gated,
    )
    if stacked:
        return Model({"cross": cross}, k, {"cross": deep_part(config)})
    first = FullyConnected(len(fields), k, inputs, units, bias=not config.batch_norm)
    operators: dict[str, Operator] = {"cross": cross, "fc": first}
    return Model(operators, k, {"fc": deep_part(config)})

"""A model is operators and a head; each file here defines one, found by its file name.

``build(config)`` of a file returns a ``Model``. The head runs on the home slice only.
Dims: B samples at home, P numbers of a total.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from des_core.config import ModelConfig
from des_core.engine.dense import Home
from des_core.engine.operators import Operator


class Model(nn.Module):
    """Operators by ledger name, one bias, and a head that joins their outputs.

    Args:
        operators: weights-rich layers; those with dense weights are torch modules.
        factors: numbers per embedding that rows hold beside the linear weight, 0 for none.
        tower: what runs on the ``fc`` operator's output, if there is one.
    """

    def __init__(self, operators: Mapping[str, Operator], factors: int, tower: nn.Module | None = None) -> None:
        super().__init__()
        self.operators = dict(operators)
        self.factors = factors
        self.tower = tower
        self.bias = nn.Parameter(torch.zeros(()))
        for name, operator in operators.items():
            if isinstance(operator, nn.Module):
                self.add_module(name, operator)

    @property
    def row_width(self) -> int:
        """Numbers per row, K: the linear weight and the factors."""
        return 1 + self.factors

    def forward(self, totals: Mapping[str, Tensor], home: Home) -> Tensor:
        """Logits (rating: predictions) [B] of the home slice, from the totals [B, P] of all operators."""
        logits_B: Tensor = self.bias
        for name, operator in self.operators.items():
            output = operator.finish(totals[name])
            logits_B = logits_B + (self.tower(output, home) if self.tower is not None and name == "fc" else output)
        return logits_B


def build(config: ModelConfig, fields: int, seed: int) -> Model:
    """The model of a config, which knows its name; dense weights' first values depend on ``seed`` alone."""
    module = importlib.import_module(f"{__name__}.{config.name}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Model = module.build(config, fields)
    return model

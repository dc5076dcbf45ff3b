"""A model is operators and what follows them; each file here defines one, found by its file name.

``build(config, fields, inputs)`` of a file returns a ``Model``. What follows runs on the home slice only.
Dims: B samples at home, P numbers of a total, M dense inputs.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from des_core.config import ModelConfig
from des_core.engine.dense_layers import Home, Tower
from des_core.engine.operators import Operator


class Model(nn.Module):
    """One bias, operators by ledger name, and the towers that turn wide outputs into one number.

    Args:
        operators: weights-rich layers; an output that no tower takes is one number per sample.
        factors: numbers per embedding that rows hold beside the linear weight, 0 for none.
        towers: what runs on an operator's output, by the operator's name.
        inputs: dense inputs that get a linear weight each, 0 where operators take them up.
    """

    def __init__(
        self,
        operators: Mapping[str, Operator],
        factors: int,
        towers: Mapping[str, nn.Module] | None = None,
        inputs: int = 0,
    ) -> None:
        super().__init__()
        self.operators = nn.ModuleDict(operators)
        self.towers = nn.ModuleDict(towers or {})
        self.factors = factors
        self.bias = nn.Parameter(torch.zeros(()))
        self.linear_M = nn.Parameter(torch.zeros(inputs)) if inputs else None

    @property
    def by_name(self) -> dict[str, Operator]:
        """The operators, typed."""
        return dict(self.operators.items())  # type: ignore[arg-type]

    @property
    def row_width(self) -> int:
        """Numbers per row, K: the linear weight and the factors."""
        return 1 + self.factors

    def forward(self, totals: Mapping[str, Tensor], home: Home) -> Tensor:
        """Logits (rating: predictions) [B] of the home slice, from the totals [B, P] of all operators."""
        logits_B: Tensor = self.bias
        if self.linear_M is not None:
            logits_B = logits_B + home.inputs_BM @ self.linear_M
        for name, operator in self.by_name.items():
            output = operator.finish(totals[name])
            logits_B = logits_B + (self.towers[name](output, home) if name in self.towers else output.flatten())
        return logits_B


def build(config: ModelConfig, fields: Sequence[str], inputs: int, seed: int) -> Model:
    """The model of a config, which knows its name; dense weights' first values depend on ``seed`` alone.

    Args:
        fields: names of the fields with rows, in order, F.
        inputs: dense inputs, M.
    """
    module = importlib.import_module(f"{__name__}.{config.name}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Model = module.build(config, fields, inputs)
    return model


def deep_part(config: ModelConfig, inputs: int = 0) -> Tower:
    """The tower of a config's hidden layers; ``inputs`` is the width of its input if the first layer runs in it."""
    return Tower(config.hidden, config.dropout, config.batch_norm, inputs)

"""FinalMLP: two deep parts whose inputs are gated, joined by a bilinear form (Mao et al., AAAI 2023).

    logit = bias + w_1 . o_1 + w_2 . o_2 + sum over heads j of o_1j^T W_j o_2j      o_s the stream's last hidden layer

A head j has its share of both streams' units. Dims: B samples, H heads, i and j units of a head of the two streams.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from des_core.config import ModelConfig
from des_core.engine.dense_layers import Home, Tower
from des_core.engine.models import Model
from des_core.engine.operators.gated_streams import GatedStreams
from des_core.errors import ConfigError


class TwoStreams(nn.Module):
    """Both streams after their first layers, and what joins them; ``[B, h_1 + h_2] -> [B]``."""

    def __init__(self, first: Tower, second: Tower, widths: Sequence[tuple[int, ...]], heads: int) -> None:
        super().__init__()
        self.first, self.second = first, second
        self._split = [width[0] for width in widths]
        self.join_Hij = nn.Parameter(torch.empty(heads, *(width[-1] // heads for width in widths)))
        nn.init.xavier_normal_(self.join_Hij)

    def forward(self, x_BP: Tensor, home: Home) -> Tensor:
        first_Bh, second_Bh = x_BP.split(self._split, 1)
        first_Bh, second_Bh = self.first.last_hidden(first_Bh, home), self.second.last_hidden(second_Bh, home)
        left_BHi, right_BHj = (x.unflatten(1, (len(self.join_Hij), -1)) for x in (first_Bh, second_Bh))
        joined_B = torch.einsum("bhi,hij,bhj->b", left_BHi, self.join_Hij, right_BHj)
        out_B: Tensor = self.first.output(first_Bh)[:, 0] + self.second.output(second_Bh)[:, 0] + joined_B
        return out_B


def build(config: ModelConfig, fields: Sequence[str], inputs: int) -> Model:
    """The model.

    Raises:
        ConfigError: model.gate_fields names a field that owns no rows or does not exist.
    """
    hidden = (config.hidden, config.hidden2 or config.hidden)
    contexts = [[_number(name, fields) for name in names] for names in config.gate_fields or ((), ())]
    streams = GatedStreams(
        len(fields),
        config.factors,
        inputs,
        (hidden[0][0], hidden[1][0]),
        contexts,
        config.gate_width,
        bias=not config.batch_norm,
        line="streams",
    )
    first = Tower(hidden[0], config.dropout, config.batch_norm)
    second = Tower(hidden[1], config.dropout, config.batch_norm, dropouts=len(hidden[0]))
    return Model({"streams": streams}, config.factors, {"streams": TwoStreams(first, second, hidden, config.heads)})


def _number(name: str, fields: Sequence[str]) -> int:
    if name in fields:
        return list(fields).index(name)
    close = difflib.get_close_matches(name, fields, n=1)
    hint = f"did you mean {close[0]}?" if close else f"fields with rows: {', '.join(fields)}"
    raise ConfigError(f"model.gate_fields: there is no field {name!r} with rows; {hint}")

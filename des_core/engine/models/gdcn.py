"""GDCN: DCN V2 with a gate on every element of every cross layer (Wang et al., CIKM 2023)."""

from __future__ import annotations

from collections.abc import Sequence

from des_core.config import ModelConfig
from des_core.engine.models import Model, dcn_v2


def build(config: ModelConfig, fields: Sequence[str], inputs: int) -> Model:
    """The model; structure parallel is the paper's GDCN-P, stacked its GDCN-S."""
    return dcn_v2.build(config, fields, inputs, gated=True)

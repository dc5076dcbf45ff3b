"""AutoInt: logit = bias + w . attention(field vectors) (Song et al., CIKM 2019)."""

from __future__ import annotations

from collections.abc import Sequence

from des_core.config import ModelConfig
from des_core.engine.models import Model
from des_core.engine.operators.attention import FieldAttention


def build(config: ModelConfig, fields: Sequence[str], inputs: int) -> Model:
    """The model."""
    layers, heads, width = config.attention_layers, config.attention_heads, config.attention_width
    return Model(
        {"attention": FieldAttention(len(fields), config.factors, inputs, layers, heads, width)}, config.factors
    )

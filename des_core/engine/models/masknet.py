"""MaskNet: blocks with masks made from the sample, side by side or stacked, and a tower (Wang et al., DLP-KDD 2021)."""

from __future__ import annotations

from collections.abc import Sequence

from des_core.config import ModelConfig
from des_core.engine.models import Model, deep_part
from des_core.engine.operators.mask_blocks import MaskBlocks


def build(config: ModelConfig, fields: Sequence[str], inputs: int) -> Model:
    """The model."""
    blocks = MaskBlocks(
        len(fields),
        config.factors,
        inputs,
        config.mask_blocks,
        config.mask_width,
        config.mask_ratio,
        stacked=config.structure == "stacked",
    )
    return Model({"blocks": blocks}, config.factors, {"blocks": deep_part(config, blocks.width)})

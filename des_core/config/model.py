"""What is trained: [model]."""

from __future__ import annotations

import difflib
import pkgutil
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from des_core.config.section import NonNegative, Section

MODELS = sorted(file.name for file in pkgutil.iter_modules([str(Path(__file__).parent.parent / "engine" / "models")]))
"""Names of the models: files of their folder, listed without importing one."""


class ModelConfig(Section):
    """What is trained."""

    name: str = Field("deepfm", description=f"Model, a file of des_core/engine/models: {', '.join(MODELS)}.")
    factors: int = Field(16, ge=1, le=1024, description="Numbers in an embedding, k.")
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (64, 32), min_length=1, description="Widths of the fully connected layers, first to last."
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of units that dropout sets to zero after each hidden layer's activation."
    )
    batch_norm: bool = Field(False, description="Normalise each hidden layer over the global batch.")
    init: NonNegative = Field(0.01, description="Standard deviation of the factors' first values.")
    structure: Literal["parallel", "stacked"] = Field(
        "parallel",
        description="dcn, dcn_v2, gdcn: the deep part beside the cross network, or on top of it; masknet: blocks "
        "beside each other, or one on top of the other.",
    )
    cross_layers: int = Field(3, ge=1, le=64, description="dcn, dcn_v2, gdcn: layers of the cross network.")
    cross_rank: int = Field(16, ge=0, description="dcn_v2, gdcn: rank of a cross layer's weights; 0: full.")
    bottom: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (64,), description="dlrm: widths of the layers under the dense inputs; a last one of width factors follows."
    )
    attention_layers: int = Field(2, ge=1, le=16, description="autoint: self-attention layers over the fields.")
    attention_heads: int = Field(2, ge=1, le=64, description="autoint: heads of each layer.")
    attention_width: int = Field(16, ge=1, le=1024, description="autoint: numbers per head and field.")

    gate_fields: tuple[tuple[str, ...], ...] = Field(
        (),
        description="finalmlp: the fields that the gates of the first and of the second stream are made from, such as "
        "[['user'], ['item']]; empty: each gate is a learned constant.",
    )
    gate_width: int = Field(32, ge=1, description="finalmlp: hidden units of a gate that is made from fields.")
    hidden2: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="finalmlp: widths of the second stream's layers; empty: as hidden, which are the first's."
    )
    heads: int = Field(
        1, ge=1, le=64, description="finalmlp: heads of the bilinear form; they share out the streams' last layers."
    )
    mask_blocks: int = Field(3, ge=1, le=64, description="masknet: mask blocks.")
    mask_width: int = Field(64, ge=1, description="masknet: outputs of each block.")
    mask_ratio: float = Field(
        1.0, gt=0, le=8, description="masknet: hidden units of a mask by the width of what it masks."
    )
    senet_reduction: int = Field(
        3, ge=1, description="fibinet: fields for each unit of the squeezed layer that weighs fields."
    )

    @model_validator(mode="after")
    def _streams_fit(self) -> ModelConfig:
        if self.gate_fields and len(self.gate_fields) != 2:
            raise ValueError(
                f"gate_fields must be two lists of fields, one for each stream; it has {len(self.gate_fields)}"
            )
        for key, widths in (("hidden", self.hidden), ("hidden2", self.hidden2 or self.hidden)):
            if self.name == "finalmlp" and widths[-1] % self.heads:
                raise ValueError(f"heads = {self.heads} must divide the last width of {key}, {widths[-1]}")
        return self

    @field_validator("name")
    @classmethod
    def _model_is_known(cls, name: str) -> str:
        if name not in MODELS:
            close = difflib.get_close_matches(name, MODELS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it is one of {', '.join(MODELS)}"
            raise ValueError(f"unknown model {name!r}; {hint}")
        return name

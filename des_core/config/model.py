"""What is trained: [model]."""

from __future__ import annotations

import difflib
import pkgutil
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

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
        "parallel", description="dcn, dcn_v2: the deep part beside the cross network, or on top of it."
    )
    cross_layers: int = Field(3, ge=1, le=64, description="dcn, dcn_v2: layers of the cross network.")
    cross_rank: int = Field(16, ge=0, description="dcn_v2: rank of a cross layer's weights; 0: full.")
    bottom: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (64,), description="dlrm: widths of the layers under the dense inputs; a last one of width factors follows."
    )
    attention_layers: int = Field(2, ge=1, le=16, description="autoint: self-attention layers over the fields.")
    attention_heads: int = Field(2, ge=1, le=64, description="autoint: heads of each layer.")
    attention_width: int = Field(16, ge=1, le=1024, description="autoint: numbers per head and field.")

    @field_validator("name")
    @classmethod
    def _model_is_known(cls, name: str) -> str:
        if name not in MODELS:
            close = difflib.get_close_matches(name, MODELS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it is one of {', '.join(MODELS)}"
            raise ValueError(f"unknown model {name!r}; {hint}")
        return name

"""What every table of the TOML has in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue

Positive = Annotated[float, Field(gt=0)]


NonNegative = Annotated[float, Field(ge=0)]


EXPERT: dict[str, JsonValue] = {"expert": True}
"""Marks a key that hardly anybody sets: the documentation lists it apart."""


class Section(BaseModel):
    """A frozen table of the TOML; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

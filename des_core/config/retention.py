"""What stays in storage: [retention]."""

from __future__ import annotations

from pydantic import Field

from des_core.config.section import Section


class RetentionConfig(Section):
    """What stays in storage after each run, and what `des clean` deletes."""

    days: int = Field(
        0,
        ge=0,
        description="Days, back from the newest, whose features stay, and whose runs stay that no kept version came "
        "from; 0: all.",
    )
    versions: int = Field(
        0,
        ge=0,
        description="Newest versions of the model whose weights stay, beside those with an alias; 0: all.",
    )

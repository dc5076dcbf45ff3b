"""Writes config.md from the models that check a config: ``make docs``."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from typing import Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from des_core.config import Config

HEAD = """# Configuration

One TOML describes one run. It is checked whole before anything starts: an unknown key, a value of another kind or
two keys that contradict each other are one clear line and exit code 2. This page is written by `make docs`.

- Every command takes `--set section.key=value`, any number of times. The value is read as TOML, or else as text:
  `--set train.workers=4`, `--set 'model.hidden=[128, 64]'`, `--set run.name=trial`. A table of a list is named by its
  `name` or its position: `--set fields.movie.kind=multi`, `--set source.join.0.path=movies.csv`.
- `${NAME}` in any text is the environment variable of that name; one that is not set is an error.
- A relative path counts from the folder of its TOML. In `--set`, on the command line, after a variable, and in the
  default `runs/NAME`, it counts from the current directory.
- Keys that hardly anybody sets stand apart, at the end.
- A key that the chosen model or format does not read is accepted, so one file serves `--set model.name=` of any model.
"""


EXPERT = """
## Expert keys

They have good values by themselves. Set one to repeat an experiment, or where a measurement of your own says so.

| key | value | default | what it does |
|---|---|---|---|"""


def sections(expert: list[str], model: type[BaseModel], about: str = "", title: str = "") -> Iterator[str]:
    """The Markdown of a table's keys, then of the tables under it; rows of expert keys go to ``expert``."""
    rows: list[str] = []
    below = []
    for name, field in model.model_fields.items():
        inner = table_of(field.annotation)
        path = f"{title}.{name}" if title else name
        if inner is None:
            apart = bool(isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("expert"))
            cells = (f"`{path if apart else name}`", kind(field), default(field), str(field.description))
            (expert if apart else rows).append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
        else:
            many = typing.get_origin(field.annotation) is tuple
            below.append(
                sections(expert, inner, field.description or inner.__doc__ or "", f"[[{path}]]" if many else path)
            )
    if rows:
        heading = title if title.startswith("[") else f"[{title}]"
        yield f"\n## `{heading}`\n\n{about}\n\n| key | value | default | what it does |\n|---|---|---|---|"
        yield from rows
    for part in below:
        yield from part


def table_of(annotation: Any) -> type[BaseModel] | None:
    """The model of a table or a list of tables; None for a plain value."""
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def kind(field: FieldInfo) -> str:
    """What may stand there, with its bounds."""
    signs = {Ge: ("≥", "ge"), Gt: (">", "gt"), Le: ("≤", "le"), Lt: ("<", "lt")}
    bounds = [
        f"{sign} {getattr(limit, key):g}"
        for cls, (sign, key) in signs.items()
        for limit in field.metadata
        if isinstance(limit, cls)
    ]
    return ", ".join([words(field.annotation), *bounds])


def words(annotation: Any) -> str:
    """A type in words."""
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return words(inside[0])
    if origin is typing.Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in inside)
    if origin is tuple:
        return f"list of {words(inside[0])}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(words(part) for part in inside)
    return {str: "text", int: "whole number", float: "number", bool: "`true` or `false`"}[annotation]


def default(field: FieldInfo) -> str:
    """The default as TOML."""
    if field.is_required():
        return "must be given"
    return f"`{json.dumps(field.default, ensure_ascii=False)}`"


def page() -> str:
    """config.md."""
    expert: list[str] = []
    return HEAD + "\n".join([*sections(expert, Config), EXPERT, *expert]) + "\n"


if __name__ == "__main__":
    print(page(), end="")

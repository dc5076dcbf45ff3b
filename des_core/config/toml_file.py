"""Reads a run's TOML before it is checked, and words the faults that the check finds.

Reading goes: parse, expand ``${NAME}``, make paths absolute, apply ``--set``. A path counts from the
folder of its file; one in ``--set``, or one that begins with a variable, from the current directory.
"""

from __future__ import annotations

import datetime
import difflib
import json
import os
import re
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from des_core.errors import ConfigError

PATHS = {
    ("source", "path"),
    ("source", "train"),
    ("source", "valid"),
    ("source", "test"),
    ("source", "ready"),
    ("source", "join", "path"),
    ("run", "dir"),
    ("storage", "root"),
}

RULES = {
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text in quotes",
    "tuple_type": "must be a list",
    "model_type": "must be a table",
    "literal_error": "must be {expected}",
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "too_short": "must hold at least {min_length} value",
    "string_too_short": "must not be empty",
    "string_too_long": "must not be longer than {max_length}",
    "string_pattern_mismatch": "must match {pattern}",
}
"""pydantic's kinds of fault, in the words of this project."""


def read_document(path: str | Path, relative: dict[str, str]) -> dict[str, Any]:
    """The tables of a TOML file, with variables expanded and paths absolute.

    Args:
        relative: takes the keys whose path was not absolute, and what stood there.

    Raises:
        ConfigError: no such file, not TOML, or a variable that is not set.
    """
    try:
        document = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text ({error})") from None
    resolved: dict[str, Any] = _resolve(document, (), Path(path).resolve().parent, str(path), relative)
    return resolved


def apply_override(document: dict[str, Any], override: str, relative: dict[str, str]) -> None:
    """Set one ``section.key=value``; the value is read as TOML, or else taken as text.

    An item of a list of tables is named by its ``name`` or its position: ``fields.movie.kind=multi``.

    Raises:
        ConfigError: it is not of that form, or goes through something that is not a table.
    """
    key, equals, text = override.partition("=")
    words = key.strip().split(".")
    if not equals or not all(words):
        raise ConfigError(f"--set {override}: write it as section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    target: Any = document
    known: tuple[str, ...] = ()
    for word in words[:-1]:
        if isinstance(target, list):
            target = _item(target, word, override)
        else:
            target, known = target.setdefault(word, {}), (*known, word)
        if not isinstance(target, dict | list):
            raise ConfigError(f"--set {override}: {word} is not a table; write it as section.key=value")
    if isinstance(target, list):
        raise ConfigError(f"--set {override}: say which of {'.'.join(known)} and which key of it")
    known = (*known, words[-1])
    relative.pop(".".join(known), None)
    target[words[-1]] = _resolve(value, known, Path.cwd(), f"--set {override}", relative)


def validation_message(error: ValidationError, model: type[BaseModel], document: Any) -> str:
    """The first fault on one line: key, value and what it must be, or the nearest known key."""
    # A mistyped key is often missing under its right name as well: name the typing mistake.
    faults = sorted(error.errors(include_url=False), key=lambda fault: fault["type"] != "extra_forbidden")
    first = _key(faults[0]["loc"], model, document)
    # A value that fits no branch of a union has one fault per branch, the deepest where it came closest.
    keyed = [(_key(fault["loc"], model, document), fault) for fault in faults]
    same = [(key, fault) for key, fault in keyed if key == first or (first and key.startswith(f"{first}."))]
    key = max((key for key, _ in same), key=lambda key: key.count("."))
    chosen = [fault for other, fault in same if other == key]
    fault = chosen[0]
    if fault["type"] == "extra_forbidden":
        return f"unknown key {key}; {_suggest(str(fault['loc'][-1]), _table(fault['loc'], model))}"
    if fault["type"] == "missing":
        return f"{key} is missing; add it"
    if fault["type"] == "value_error":
        return f"{key}: {fault['ctx']['error']}" if key else str(fault["ctx"]["error"])
    rules = dict.fromkeys(_rule(fault) for fault in chosen)
    wanted = " or ".join([next(iter(rules)), *(rule.removeprefix("must be ") for rule in list(rules)[1:])])
    return f"{key} = {json.dumps(fault['input'], default=str, ensure_ascii=False)} {wanted}"


def _resolve(value: Any, key: tuple[str, ...], base: Path, origin: str, relative: dict[str, str]) -> Any:
    """A TOML value with variables expanded, paths absolute and dates as text."""
    if isinstance(value, dict):
        return {word: _resolve(item, (*key, word), base, origin, relative) for word, item in value.items()}
    if isinstance(value, list):
        return [_resolve(item, key, base, origin, relative) for item in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if not isinstance(value, str):
        return value
    text = re.sub(r"\$\{(\w+)\}", lambda match: _variable(match[1], origin), value)
    if key not in PATHS and not text.startswith("sqlite:///"):
        return text
    path = text.removeprefix("sqlite:///")
    if path and "://" not in path and not path.startswith("/"):
        relative[".".join(key)] = text
    return _absolute(text, Path.cwd() if value.startswith("${") else base)


def _variable(name: str, origin: str) -> str:
    value = os.environ.get(name)
    if value is None:
        raise ConfigError(
            f"{origin}: environment variable {name} is not set; "
            f"say where the data are with: export {name}=/path/to/folder"
        )
    return value


def _absolute(text: str, base: Path) -> str:
    """A path from ``base``; any other address than SQLite's stays."""
    prefix = "sqlite:///" if text.startswith("sqlite:///") else ""
    path = text.removeprefix(prefix)
    if not path or "://" in path:
        return text
    return prefix + os.path.normpath(base / os.path.expanduser(path))


def _item(tables: list[Any], word: str, override: str) -> Any:
    """The table of a list that has this name or position."""
    names = [table.get("name") if isinstance(table, dict) else None for table in tables]
    if word in names:
        return tables[names.index(word)]
    if word.isdecimal() and int(word) < len(tables):
        return tables[int(word)]
    known = ", ".join(str(position if name is None else name) for position, name in enumerate(names))
    raise ConfigError(f"--set {override}: no {word!r} there; it is one of {known}")


def _key(location: tuple[int | str, ...], model: type[BaseModel], document: Any) -> str:
    """The key as ``--set`` takes it; names of union branches, which pydantic adds, fall out."""
    words: list[str] = []
    for depth, part in enumerate(location):
        document = _inside(document, part)
        if isinstance(part, int):
            name = _inside(document, "name")
            words.append(name if isinstance(name, str) and name else str(part))
        elif part in _table(location[: depth + 1], model).model_fields or document is not None:
            words.append(part)
    return ".".join(words)


def _inside(document: Any, part: int | str) -> Any:
    if isinstance(document, Mapping):
        return document.get(part)
    return document[part] if isinstance(document, list) and isinstance(part, int) else None


def _table(location: tuple[int | str, ...], model: type[BaseModel]) -> type[BaseModel]:
    """The table that holds the last part of a location."""
    for part in location[:-1]:
        field = model.model_fields.get(str(part))
        kinds = (field.annotation, *typing.get_args(field.annotation)) if field else ()
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), model)
    return model


def _suggest(word: str, table: type[BaseModel]) -> str:
    known = list(table.model_fields)
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"


def _rule(fault: Mapping[str, Any]) -> str:
    rule = RULES.get(fault["type"])
    return rule.format(**fault.get("ctx", {})) if rule else fault["msg"]

"""A column of the log -> labels: as they are, or made 0 or 1 by a comparison.

Dims: R records.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from des_core.config import SourceConfig
from des_core.data.read.hashing import Array, as_text
from des_core.data.read.parsing import is_text, to_numbers
from des_core.errors import ConfigError

F32 = np.ndarray[Any, np.dtype[np.float32]]
Faults = dict[int, str]
"""Position of a bad record -> what is wrong with it."""

_COMPARE: dict[str, Callable[[Any, Any], Array]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}


WORDS = {"true": "1", "t": "1", "yes": "1", "y": "1", "false": "0", "f": "0", "no": "0", "n": "0"}
"""Labels of clicks in words."""


@dataclass(frozen=True)
class Rule:
    """``sign`` and what a label is compared with: a number, or a text."""

    sign: str
    operand: float | str


def parse_positive(text: str) -> Rule | None:
    """The comparison of ``source.positive``; None where it is empty.

    Raises:
        ConfigError: it is not an operator and a number, or == or != and a text.
    """
    if not text.strip():
        return None
    found = re.fullmatch(r"\s*(>=|<=|==|!=|>|<)\s*(.+?)\s*", text)
    if not found:
        raise ConfigError(f"source.positive = {text!r}: write an operator and a value, as in '>= 4' or '== click'")
    sign, operand = found.groups()
    try:
        return Rule(sign, float(operand))
    except ValueError:
        pass
    if sign not in ("==", "!="):
        raise ConfigError(f"source.positive = {text!r}: {operand!r} is not a number; texts only compare by == and !=")
    quoted = re.fullmatch(r"""(["'])(.*)\1""", operand)
    return Rule(sign, quoted[2] if quoted else operand)


def labels_of(array: pa.Array, source: SourceConfig) -> tuple[F32, Faults]:
    """Labels [R], and the records that have none that fits the task."""
    absent_R = ~np.asarray(array.is_valid())
    rule = parse_positive(source.positive) if source.task == "click" else None
    faults = dict.fromkeys(np.flatnonzero(absent_R).tolist(), f"column {source.label}: the label is missing")
    if rule and isinstance(rule.operand, str):
        texts = np.array(as_text(array).to_pylist(), dtype=object)
        return _COMPARE[rule.sign](texts, rule.operand).astype(np.float32), faults
    values_R, bad_R = to_numbers(array)
    if source.task == "click" and not rule and bad_R.any():
        # Few logs have labels in words, and looking for them would cost every log.
        values_R, bad_R = to_numbers(_words_as_numbers(array))
    bad_R = bad_R | (np.isnan(values_R) & ~absent_R)
    wanted = "a number"
    if rule:
        wanted += f", which source.positive = {source.positive!r} compares with"
        values_R = np.where(bad_R, 0, _COMPARE[rule.sign](values_R, rule.operand))
    elif source.task == "click":
        values_R = np.where(values_R == -1, 0, values_R)
        bad_R = (bad_R | ((values_R != 0) & (values_R != 1))) & ~absent_R
        wanted = "0 or 1 or true or false; source.positive says which labels count as 1"
    for index in np.flatnonzero(bad_R).tolist():
        faults[index] = f"column {source.label}: the label {shown(array, index)} is not {wanted}"
    return values_R.astype(np.float32), faults


def _words_as_numbers(array: pa.Array) -> pa.Array:
    """Labels in words, such as true and false, as 1 and 0; others stay."""
    if pa.types.is_boolean(array.type):
        return array.cast(pa.int8())
    if not is_text(array):
        return array
    texts = as_text(array)
    words = pc.utf8_lower(pc.utf8_trim_whitespace(texts))
    place = pc.index_in(words, value_set=pa.array(list(WORDS)))
    numbers = pa.array(list(WORDS.values())).take(place)
    return pc.coalesce(numbers, texts.cast(numbers.type))


def shown(array: pa.Array, index: int) -> str:
    """A value as a message shows it: quoted and not long."""
    value = array[index].as_py()
    text = repr(value) if isinstance(value, str | bytes) else str(value)
    return text if len(text) <= 40 else text[:37] + "..."

"""One value, one key: what a field's values are, and how every reader brings them to it.

    text      as it is written; "007" and "1.10" stay what they are
    whole     a whole number: 7, 7.0 and "7.0" are "7"
    number    7.5, "7.50" and "7.5" are "7.5"; whole ones as above
    boolean   true, "True", "TRUE" and 1 are "true"

A field's form is settled by the first values that are ingested, unless its config says it. It is kept in the
manifests of the parts and in the model, so that a CSV written from a data frame, JSON, Parquet and a request give
one key to one value. A text that does not look like its field's form stays as it is written: it has the same key
by every road. A typed value that cannot be brought to its form is refused.

Texts count as numbers only if a program would write them so: no leading zeros, and decimals that are either the
shortest that give the value or equally many in all values. "1.1", "1.10" and "1.2" are therefore texts.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numba import njit

from des_core.contracts import Form
from des_core.data.read.hashing import Array, as_text, number_text, spans_of
from des_core.errors import DataError

_WHOLE = re.compile(r"-?(0|[1-9]\d*)")
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.(\d+))?([eE][+-]?\d+)?")
_BOOLEANS = {"true": "true", "True": "true", "TRUE": "true", "false": "false", "False": "false", "FALSE": "false"}
_BITS = {"1": "true", "1.0": "true", "0": "false", "0.0": "false"}
_EXACT = 2.0**53


def form_of_values(array: pa.Array) -> Form:
    """The form of plain values, one type or texts [V]; empty if all are missing."""
    texts = [text for text in pc.unique(as_text(_plain(array))).to_pylist() if text is not None]
    if not texts:
        return ""
    if pa.types.is_temporal(_plain(array).type):
        return "text"
    if all(text in _BOOLEANS for text in texts):
        return "boolean"
    found = [_NUMBER.fullmatch(text) for text in texts]
    if not all(found):
        return "text"
    decimals = {len(one[3] or "") if not one[4] else -1 for one in found if one}
    shortest = all(_WHOLE.fullmatch(text) or repr(float(text)) == text for text in texts)
    if not shortest and (len(decimals) > 1 or -1 in decimals):
        return "text"
    if all(_WHOLE.fullmatch(text) or float(text).is_integer() for text in texts):
        return "whole"
    return "number"


def in_form(array: pa.Array, form: Form) -> pa.Array:
    """Texts of plain values [V], the same text for equal values of the form; null and NaN stay null.

    A dictionary of texts stays one.

    Raises:
        DataError: the type is one whose values cannot be brought to the form.
    """
    if pa.types.is_dictionary(array.type):
        texts = in_form(array.dictionary, form)
        return pa.DictionaryArray.from_arrays(array.indices, texts)
    if isinstance(array, pa.ExtensionArray):
        return in_form(array.storage, form)
    _check_type(array, form)
    texts = as_text(array)
    if form in ("", "text"):
        return texts
    odd_V = _odd(texts, form)
    if not len(odd_V):
        return texts
    changed = texts.take(pa.array(odd_V)).to_pylist()
    mask = np.zeros(len(texts), np.bool_)
    mask[odd_V] = True
    values = pa.array([_brought(text, form) for text in changed], texts.type)
    return pc.replace_with_mask(texts, pa.array(mask), values)


def _plain(array: pa.Array) -> pa.Array:
    """The values of a dictionary or an extension, each once is enough."""
    if isinstance(array, pa.ExtensionArray):
        return array.storage
    return _plain(array.dictionary_decode()) if pa.types.is_dictionary(array.type) else array


def _check_type(array: pa.Array, form: Form) -> None:
    kind = array.type
    real = pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    if form == "text" and (real or pa.types.is_boolean(kind)) and array.null_count < len(array):
        raise DataError(
            f"its values are texts, and a column of type {kind} does not say how they are written; give them as text"
        )
    if form in ("whole", "number") and pa.types.is_boolean(kind) and array.null_count < len(array):
        raise DataError(f"its values are numbers ({form}), and a column of type {kind} holds none; give numbers")
    if form == "whole" and pa.types.is_floating(kind):
        largest = pc.max(pc.abs(array.cast(pa.float64()))).as_py()
        if largest is not None and _EXACT < largest < math.inf:
            raise DataError(
                f"its values are whole numbers, and a column of type {kind} cannot hold "
                f"{largest:.0f} exactly; give whole numbers or text"
            )


def _odd(texts: pa.Array, form: Form) -> Array:
    """Positions of texts that are perhaps not written in the form."""
    if form == "boolean":
        wrong = pc.invert(pc.is_in(texts, value_set=pa.array(["true", "false"], texts.type)))
        return np.flatnonzero(pc.and_(wrong, texts.is_valid()).to_numpy(zero_copy_only=False))
    data, offsets, _ = spans_of(texts)
    return _with_a_point(data, offsets)


@njit(nogil=True, cache=True)
def _with_a_point(data: Array, offsets: Array) -> Array:
    """Positions of texts that hold a point or an exponent."""
    found = np.empty(len(offsets) - 1, np.int64)
    count = 0
    for i in range(len(offsets) - 1):
        for at in range(offsets[i], offsets[i + 1]):
            if data[at] == 46 or data[at] == 69 or data[at] == 101:
                found[count] = i
                count += 1
                break
    return found[:count]


def _brought(text: Any, form: Form) -> Any:
    """A text in its field's form, or as it is."""
    if text is None:
        return None
    if form == "boolean":
        return _BOOLEANS.get(text) or _BITS.get(text, text)
    if not _NUMBER.fullmatch(text):
        return text
    value = float(text)
    return number_text(value) if math.isfinite(value) else text

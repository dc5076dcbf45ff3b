"""A value's key: a stable 64-bit hash, the same in every stage, process and version.

    h = n * 0x9E3779B97F4A7C15                  n = the text's length in bytes
    h = splitmix64(h ^ word)                    for each 8-byte little-endian word, the last one zero padded

An empty text is splitmix64(0); a missing value is a key of its own. Texts are hashed as their bytes are
written, so "007" is not "7". Typed values are hashed as the text that stands for them: integers in
decimal, whole floats as integers, other floats by their shortest decimal form, booleans as true and false. What
is hashed is first brought to its field's form (forms.py). Two of 10^9 values of one field
share a key with probability 2.7 %. Keys are int64: the bit pattern of the unsigned hash.

Source of splitmix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numba import njit, uint64

from des_core.errors import DataError

I64 = np.ndarray[Any, np.dtype[np.int64]]
Array = np.ndarray[Any, np.dtype[Any]]

MISSING: int = -6561649948076160823
"""Key of a missing value: splitmix64(0x6D697373696E6700)."""

_NO_BITS = np.zeros(0, np.uint8)


@njit(nogil=True, cache=True)
def splitmix64(z: Any) -> Any:
    """The uint64 that follows state ``z`` (uint64)."""
    z = z + uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> uint64(30))) * uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> uint64(27))) * uint64(0x94D049BB133111EB)
    return z ^ (z >> uint64(31))


def hash_text(array: pa.Array | pa.ChunkedArray) -> I64:
    """Keys of texts (string or binary, large or not): int64, ``MISSING`` for null."""
    if isinstance(array, pa.ChunkedArray):
        return np.concatenate([np.zeros(0, np.int64), *(hash_text(chunk) for chunk in array.chunks)])
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    out = np.empty(len(array), np.int64)
    _hash_spans(*spans_of(array), array.offset, out)
    return out


def spans_of(array: pa.Array) -> tuple[Array, Array, Array]:
    """The bytes of texts, where each begins and the last one ends, and the bitmap of those there are, empty for all.

    The bitmap begins at position 0 of the memory, the array at ``array.offset``.
    """
    bits, offsets, data = array.buffers()
    if not len(array):
        return _NO_BITS, np.zeros(1, np.int32), _NO_BITS
    large = pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type)
    return (
        np.frombuffer(data, np.uint8) if data is not None and data.size else _NO_BITS,
        np.frombuffer(offsets, np.int64 if large else np.int32)[array.offset : array.offset + len(array) + 1],
        np.frombuffer(bits, np.uint8) if bits is not None and array.null_count else _NO_BITS,
    )


def hash_values(array: pa.Array | pa.ChunkedArray) -> I64:
    """Keys of values of any plain type; ``MISSING`` for null and NaN.

    Raises:
        DataError: lists, structs and maps have no text that stands for them.
    """
    if isinstance(array, pa.ChunkedArray):
        return np.concatenate([np.zeros(0, np.int64), *(hash_values(chunk) for chunk in array.chunks)])
    if pa.types.is_dictionary(array.type):
        keys = np.append(hash_values(array.dictionary), np.int64(MISSING))
        found: I64 = keys[array.indices.cast(pa.int64()).fill_null(len(array.dictionary)).to_numpy()]
        return found
    if pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type):
        return hash_text(array)
    return hash_text(as_text(array))


def as_text(array: pa.Array) -> pa.Array:
    """The texts that values are hashed as; null and NaN stay null.

    Raises:
        DataError: lists, structs and maps have no text that stands for them, nor have bytes that are not UTF-8.
    """
    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        return as_text(array.storage)
    if pa.types.is_dictionary(kind):
        return as_text(array.dictionary).take(array.indices)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return array
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        try:
            return array.cast(pa.large_string())
        except pa.ArrowInvalid:
            raise DataError(f"a column of type {kind} holds bytes that are not UTF-8 text; write it as text") from None
    if pa.types.is_floating(kind):
        return _float_text(array)
    if pa.types.is_decimal(kind):
        # 4.50 and 4.5 are one value, whatever the scale of the column.
        plain = pc.replace_substring_regex(array.cast(pa.string()), r"(\.\d*?)0+$", r"\1")
        return pc.replace_substring_regex(plain, r"\.$", "")
    if pa.types.is_nested(kind):
        raise DataError(
            f"a value of type {kind} is not one value; declare the field with kind = 'multi' if it is a list"
        )
    if pa.types.is_timestamp(kind):
        # Written alike whatever unit the column counts in.
        return array.cast(pa.timestamp("us", kind.tz)).cast(pa.string())
    return array.cast(pa.string())


def _float_text(array: pa.Array) -> pa.Array:
    values = array.to_numpy(zero_copy_only=False)
    unique, inverse = np.unique(values, return_inverse=True)
    texts = [number_text(value) for value in unique]
    return pa.array(texts, pa.string()).take(pa.array(inverse))


def number_text(value: Any) -> str | None:
    """The text that a float is hashed as; None for NaN."""
    if np.isnan(value):
        return None
    if np.isfinite(value) and value == np.floor(value):
        return str(int(value))
    return str(value)


def combined_keys(parts: Sequence[I64]) -> I64:
    """Keys [R] of combinations of values: the hash of the parts' keys in order, as of a text of these bytes.

    A missing part is a value like others; where all are missing, so is the combination.
    """
    keys_RP = np.ascontiguousarray(np.stack(parts, 1))
    out = np.empty(len(keys_RP), np.int64)
    _combine(keys_RP, out)
    return out


@njit(nogil=True, cache=True)
def _combine(keys_RP: Array, out: Array) -> None:
    parts = keys_RP.shape[1]
    for i in range(len(out)):
        h = uint64(8 * parts) * uint64(0x9E3779B97F4A7C15)
        missing = True
        for part in range(parts):
            h = splitmix64(h ^ uint64(keys_RP[i, part]))
            missing &= keys_RP[i, part] == MISSING
        out[i] = MISSING if missing else np.int64(h)


@njit(nogil=True, cache=True)
def word_at(data: Array, at: Any) -> Any:
    """Bytes ``at`` (uint64) to at + 8 as a little-endian uint64."""
    # Written out whole: the compiler makes one 8-byte load of it.
    return (
        uint64(data[at])
        | uint64(data[at + uint64(1)]) << uint64(8)
        | uint64(data[at + uint64(2)]) << uint64(16)
        | uint64(data[at + uint64(3)]) << uint64(24)
        | uint64(data[at + uint64(4)]) << uint64(32)
        | uint64(data[at + uint64(5)]) << uint64(40)
        | uint64(data[at + uint64(6)]) << uint64(48)
        | uint64(data[at + uint64(7)]) << uint64(56)
    )


@njit(nogil=True, cache=True)
def _hash_spans(data: Array, offsets: Array, bits: Array, first: int, out: Array) -> None:
    """Hash bytes [offsets[i], offsets[i + 1]); ``bits`` is the validity bitmap from position ``first``, or empty."""
    for i in range(len(out)):
        if len(bits) and not (bits[(first + i) >> 3] >> ((first + i) & 7)) & 1:
            out[i] = MISSING
            continue
        at = uint64(offsets[i])
        stop = uint64(offsets[i + 1])
        h = (stop - at) * uint64(0x9E3779B97F4A7C15)
        if at == stop:
            h = splitmix64(uint64(0))
        while at + uint64(8) <= stop:
            h = splitmix64(h ^ word_at(data, at))
            at += uint64(8)
        if at < stop:
            word = uint64(0)
            shift = uint64(0)
            while at < stop:
                word |= uint64(data[at]) << shift
                shift += uint64(8)
                at += uint64(1)
            h = splitmix64(h ^ word)
        out[i] = np.int64(h)

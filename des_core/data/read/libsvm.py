"""libsvm and libfm: ``label [qid:query] index:value index:value ...``, what follows # is a comment.

A line becomes a label, a list of indices and the list of their values: one multi-valued field with weights. The query,
if there is one, is a column that source.group may name.

Dims: R records of a block, V index:value pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from des_core.data.read.blocks import Block, Blocks, Range
from des_core.data.read.delimited import Raw, not_text, texts
from des_core.data.read.hashing import I64
from des_core.data.read.labels import Faults, shown
from des_core.data.read.parsing import Bool, to_numbers

LABEL, FEATURES, VALUES, QUERY = "label", "features", "values", "qid"
"""Columns of the records."""


def read_libsvm(
    path: str, encoding: str = "utf-8", queries: bool = False, within: Range | None = None, row: int = 0
) -> Iterator[Raw]:
    """The records of a file as columns of labels, indices and values, and of queries if they are asked for.

    Args:
        within: which blocks, None: all.
        row: number of the first record.
    """
    for block in Blocks(path, "", False, encoding=encoding, within=within):
        raw = _records(block, row)
        raw = raw if queries else replace(raw, table=raw.table.drop_columns([QUERY]))
        row += raw.read
        if raw.read:
            yield raw


def _records(block: Block, row: int) -> Raw:
    lines, unreadable, filled_R = _lines(block)
    numbers_R, lines = block.lines_R[filled_R], lines.filter(pa.array(filled_R))
    places = np.cumsum(filled_R) - 1
    faults = {int(places[index]): reason for index, reason in unreadable.items()}
    table, unpaired = _pairs(lines)
    faults = unpaired | faults
    keep_R = np.ones(len(lines), np.bool_)
    keep_R[list(faults)] = False
    bad = tuple((int(numbers_R[index]), reason) for index, reason in sorted(faults.items()))
    rows_R = np.arange(row, row + len(lines))
    return Raw(table.filter(pa.array(keep_R)), rows_R[keep_R], numbers_R[keep_R], bad, len(lines))


def count_records(block: Block) -> int:
    """Lines of a block that are neither empty nor only a comment."""
    return int(_lines(block)[2].sum())


def _lines(block: Block) -> tuple[pa.Array, Faults, Bool]:
    """The lines as texts without comments, those that are no text empty; why those are not; which are records."""
    lines = texts(block, [0])[0]
    unreadable = not_text(lines)
    if unreadable:
        lines = pc.if_else(pa.array(np.isin(np.arange(len(lines)), unreadable)), "", lines)
    if (block.data == ord("#")).any():
        lines = pc.replace_substring_regex(lines, r"#(?s:.*)", "")
    lines = pc.utf8_trim_whitespace(lines)
    filled_R = np.asarray(pc.not_equal(lines, "")) | np.isin(np.arange(len(lines)), unreadable)
    return lines, dict.fromkeys(unreadable, "not UTF-8 text"), filled_R


def _pairs(lines: pa.Array) -> tuple[pa.Table, Faults]:
    """Labels, lists of indices and of values, and queries of lines that are not empty, and the bad ones."""
    queries = pc.struct_field(pc.extract_regex(lines, r"^\S+\s+qid:(?P<query>\S+)"), "query")
    lines = pc.replace_substring_regex(lines, r"^(\S+)\s+qid:\S+", r"\1")
    words = pc.utf8_split_whitespace(lines)
    offsets = words.offsets.to_numpy().astype(np.int64)
    labels = words.values.take(pa.array(np.minimum(offsets[:-1], max(len(words.values) - 1, 0))))
    lengths_R = np.maximum(np.diff(offsets) - 1, 0)
    is_pair = np.ones(len(words.values), np.bool_)
    is_pair[offsets[:-1][np.diff(offsets) > 0]] = False
    pairs = words.values.filter(pa.array(is_pair))
    row_of_V: I64 = np.repeat(np.arange(len(lines)), lengths_R)
    bad_V = np.asarray(pc.count_substring(pairs, ":")) != 1
    if bad_V.any():
        pairs = pc.if_else(pa.array(bad_V), "0:0", pairs)
    halves = pc.split_pattern(pairs, ":").values
    indices = halves.take(pa.array(np.arange(0, len(halves), 2)))
    values_V, unparsed_V = to_numbers(halves.take(pa.array(np.arange(1, len(halves), 2))))
    bad_V |= unparsed_V | np.isnan(values_V) | ~np.asarray(pc.match_substring_regex(indices, r"^\d+$"))
    edges = pa.array(np.append(0, np.cumsum(lengths_R)).astype(np.int32))
    table = pa.table(
        {
            LABEL: labels,
            FEATURES: pa.ListArray.from_arrays(edges, indices),
            VALUES: pa.ListArray.from_arrays(edges, pa.array(values_V)),
            QUERY: queries,
        }
    )
    original = words.values.filter(pa.array(is_pair))
    faults = {}
    for index in np.flatnonzero(bad_V)[::-1].tolist():
        faults[int(row_of_V[index])] = f"{shown(original, index)} is not index:value"
    return table, faults

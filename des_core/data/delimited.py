"""CSV and TSV: blocks of records -> columns of text, and the records that are not whole.

The parser counts columns itself; only when it objects are a block's records looked at one by one, and
those with other than the header's number of columns, or with bytes that are no UTF-8, are taken out.
Only chosen columns are parsed.

Dims: R records of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from des_core.data.blocks import Block, blocks, cut_closely
from des_core.data.hashing import I64, Array
from des_core.errors import DataError


@dataclass(frozen=True)
class Raw:
    """Records of one block: their texts, and those that are not whole.

    ``rows_R`` counts a file's records from 0, bad ones too, a header not; ``lines_R`` its lines from 1.
    ``bad`` holds a line and a reason each; ``read`` counts the records, the bad ones among them.
    """

    table: pa.Table
    rows_R: I64
    lines_R: I64
    bad: tuple[tuple[int, str], ...]
    read: int


def read_delimited(
    path: str,
    delimiter: str,
    quoting: bool,
    header: bool | Sequence[str],
    missing: Sequence[str],
    choose: Callable[[list[str]], list[str]],
) -> Iterator[Raw]:
    """The records of a CSV or TSV as columns of text, null where a value is missing.

    Args:
        header: whether the first record names the columns, or their names; false names them "0", "1", ...
        choose: from the columns that there are to those that are read.
    """
    names: list[str] = []
    chosen: list[str] = []
    row = 0
    for block in blocks(path, delimiter, quoting):
        if not names:
            if header is True:
                names = _first_record(path, block, delimiter, quoting)
                block = block.kept(np.arange(len(block.starts_R)) > 0)
            elif header is False:
                names = [str(position) for position in range(_width(block, delimiter, quoting))]
            else:
                names = list(header)
            chosen = choose(names)
        read = len(block.starts_R)
        if read:
            yield _columns(block, row, names, chosen, delimiter, quoting, missing)
        row += read


def _first_record(path: str, block: Block, delimiter: str, quoting: bool) -> list[str]:
    first = block.kept(np.arange(len(block.starts_R)) == 0)
    places = [str(place) for place in range(_width(first, delimiter, quoting))]
    table = _parse(first.data, places, [], delimiter, quoting, (), pa.binary())
    try:
        return [column[0].as_py().decode() for column in table.columns]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: the first line is not UTF-8 text ({error.reason}); convert the file") from None


def _width(block: Block, delimiter: str, quoting: bool) -> int:
    """Columns of the block's first record."""
    first = block.kept(np.arange(len(block.starts_R)) == 0)
    counted = cut_closely(first.data, delimiter, quoting, 1, last=True)[0].columns_R
    assert counted is not None
    return int(counted[0])


def _columns(
    block: Block,
    row: int,
    names: list[str],
    chosen: list[str],
    delimiter: str,
    quoting: bool,
    missing: Sequence[str],
) -> Raw:
    """Columns of the block's whole records, of which the first is the file's record ``row``."""
    read = len(block.starts_R)
    rows_R = np.arange(row, row + read)
    if block.columns_R is None:
        try:
            table = _parse(block.data, names, chosen, delimiter, quoting, missing, pa.string())
            return Raw(table, rows_R, block.lines_R, (), read)
        except pa.ArrowInvalid:
            counted = cut_closely(block.data, delimiter, quoting, int(block.lines_R[0]), last=True)[0]
            block = replace(counted, lines_R=block.lines_R)
    whole_R, faults = _whole(block, len(names))
    if faults:
        rows_R, block = rows_R[whole_R], block.kept(whole_R)
    try:
        table = _parse(block.data, names, chosen, delimiter, quoting, missing, pa.string())
    except pa.ArrowInvalid:
        table = _parse(block.data, names, chosen, delimiter, quoting, missing, pa.binary())
        unreadable = _not_text(table)
        faults += [(int(block.lines_R[index]), reason) for index, reason in unreadable.items()]
        keep_R = np.ones(len(rows_R), np.bool_)
        keep_R[list(unreadable)] = False
        table = table.filter(pa.array(keep_R)).cast(pa.schema([(name, pa.string()) for name in table.column_names]))
        return Raw(table, rows_R[keep_R], block.lines_R[keep_R], tuple(sorted(faults)), read)
    return Raw(table, rows_R, block.lines_R, tuple(faults), read)


def _whole(block: Block, width: int) -> tuple[Array, list[tuple[int, str]]]:
    """Which records have ``width`` columns, and the line of each other one and why."""
    assert block.columns_R is not None
    whole_R = block.columns_R == width
    reasons = {i: f"{block.columns_R[i]} columns instead of {width}" for i in np.flatnonzero(~whole_R).tolist()}
    if block.open_quote:
        whole_R[-1] = False
        reasons[len(whole_R) - 1] = "a quote is not closed"
    return whole_R, [(int(block.lines_R[index]), reason) for index, reason in reasons.items()]


def _not_text(table: pa.Table) -> dict[int, str]:
    """Rows with a value that is not UTF-8, and why."""
    faults: dict[int, str] = {}
    for name in table.column_names:
        for index, value in enumerate(table.column(name).to_pylist()):
            try:
                (value or b"").decode()
            except UnicodeDecodeError:
                faults.setdefault(index, f"column {name}: not UTF-8 text")
    return faults


def _parse(
    data: bytes,
    names: list[str],
    chosen: list[str],
    delimiter: str,
    quoting: bool,
    missing: Sequence[str],
    kind: pa.DataType,
) -> pa.Table:
    """The chosen columns (all, if none are) of records that all have ``len(names)`` columns."""
    places = {name: str(place) for place, name in enumerate(names)}
    wanted = [places[name] for name in chosen] or list(places.values())
    if not data:
        return pa.table({names[int(place)]: pa.array([], kind) for place in wanted})
    table = pacsv.read_csv(
        pa.BufferReader(data),
        read_options=pacsv.ReadOptions(
            use_threads=False, block_size=len(data) + 1, column_names=[str(place) for place in range(len(names))]
        ),
        parse_options=pacsv.ParseOptions(
            delimiter=delimiter, quote_char='"' if quoting else False, newlines_in_values=quoting
        ),
        convert_options=pacsv.ConvertOptions(
            include_columns=wanted,
            column_types=dict.fromkeys(wanted, kind),
            strings_can_be_null=bool(missing),
            null_values=list(missing),
            check_utf8=not data.isascii(),
        ),
    )
    return table.rename_columns([names[int(place)] for place in wanted])

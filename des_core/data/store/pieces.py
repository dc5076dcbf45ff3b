"""Pieces: what one task encodes. Plans them for a job's files, in the files' order.

A piece is up to PIECE_BYTES of raw logs: a span of a large file, or several small files. Counting the records of spans
is a task for each; a span's first record is then known from the spans before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from des_core import storage
from des_core.config import SourceConfig
from des_core.contracts import FieldSpec, Form, Record
from des_core.data.read import blocks, libsvm
from des_core.data.read.blocks import Blocks
from des_core.data.read.delimited import names_of
from des_core.data.read.sources import dialect
from des_core.data.read.spans import Span, is_divisible, size_of, spans_of_parquet, spans_of_text
from des_core.data.store import tasks
from des_core.errors import UnusableLogsError

PIECE_BYTES = 256 << 20
"""The largest piece that can still be cut."""

WORTH_BYTES, LEAST_BYTES, PIECES = 128 << 20, 32 << 20, 64
"""Logs that one task reads at once are done before other processes have begun; larger ones give so many pieces, so that
tasks end together, but none smaller than ``LEAST_BYTES``."""


class Plan(Record):
    """What decides the features of a job's rows, given the raw files."""

    format: int = 1
    spec: str
    """``Config.features_digest``."""
    part: str
    source: SourceConfig
    sides: tuple[str, ...]
    """Digests of the side tables."""
    specs: tuple[FieldSpec, ...]
    group_form: Form
    newer: tuple[str, ...]
    """Columns that a file may lack."""
    seed: int
    timed: bool
    hold_out: float
    lateness_h: float
    rarity: int
    """One row of 2^rarity is sampled for its values' texts."""


class Piece(Record):
    """Spans that one task encodes, and the number and sha256 of each one's file."""

    number: int
    of: int
    spans: tuple[Span, ...]
    files: tuple[int, ...]
    sha256: tuple[str, ...]

    def digest(self, plan: Plan) -> str:
        """Of all that decides what becomes of the piece."""
        content = [plan.model_dump(mode="json"), self.model_dump(mode="json", include={"spans", "files", "sha256"})]
        return hashlib.sha256(storage.json_bytes(content)).hexdigest()[:20]

    def __str__(self) -> str:
        more = f" and {len(self.spans) - 1} more" if len(self.spans) > 1 else ""
        return f"piece {self.number + 1} of {self.of}, {self.spans[0]}{more}"


class Counted(Record):
    """A span's records, and where it begins and ends."""

    begin: int
    end: int
    rows: int
    lines: int


class Uncounted(Record):
    """A span to be counted; ``begin`` < 0: guess where its first record begins."""

    source: SourceConfig
    span: Span

    def __str__(self) -> str:
        return f"block {self.span.first} of {self.span.path}"


def spans_of_files(source: SourceConfig, paths: Sequence[str], run: tasks.Run) -> list[list[Span]]:
    """The spans of each file.

    Raises:
        DataError: a file is missing, broken, or its first line names no columns.
    """
    sizes = [size_of(path) for path in paths]
    most = piece_bytes(sum(sizes))
    found = [_spans(source, path, size, most) for path, size in zip(paths, sizes, strict=True)]
    if source.format == "parquet":
        return found
    heads = {place: _headed(source, spans) for place, spans in enumerate(found) if len(spans) > 1}
    guesses = [span for spans in heads.values() for span in spans]
    counts = iter(tasks.run_all(run, count_span, [Uncounted(source=source, span=span) for span in guesses]))
    for place, spans in heads.items():
        found[place] = list(_numbered(source, spans, [next(counts) for _ in spans]))
    return found


def piece_bytes(size: int) -> int:
    """Bytes of a piece of logs of that size."""
    return min(max(size // PIECES, LEAST_BYTES) if size > WORTH_BYTES else WORTH_BYTES, PIECE_BYTES)


def _spans(source: SourceConfig, path: str, size: int, most: int) -> list[Span]:
    if size > most:
        if source.format == "parquet":
            return spans_of_parquet(path, most)
        if is_divisible(path, source.encoding):
            return spans_of_text(path, most)
    return [Span(path=path, bytes=size)]


def _headed(source: SourceConfig, spans: Sequence[Span]) -> list[Span]:
    """Spans with what a file's first record says of its columns; where they begin is to be guessed."""
    head = _blocks(source, Span(path=spans[0].path))
    first = next(iter(head), None)
    names: list[str] = []
    if first is not None and source.format != "libsvm":
        names = names_of(spans[0].path, first, dialect(source)[2])
    more = {"names": tuple(names), "width": head.width, "begin": -1}
    return [spans[0], *(span.model_copy(update=more) for span in spans[1:])]


def _blocks(source: SourceConfig, span: Span) -> Blocks:
    if source.format == "libsvm":
        return Blocks(span.path, "", False, within=span.blocks)
    delimiter, quoting, header = dialect(source)
    width = span.width or (0 if isinstance(header, bool) else len(header))
    return Blocks(span.path, delimiter, quoting, width, within=span.blocks)


def count_span(item: Uncounted) -> Counted:
    """The records of a span of text; none, and no place, where a guessed beginning gives no text."""
    source, span = item.source, item.span
    begin = span.begin if span.begin >= 0 else blocks.likely_begin(span.path, span.first)
    stream = _blocks(source, span.model_copy(update={"begin": begin}))
    rows = 0
    try:
        for block in stream:
            rows += libsvm.count_records(block) if source.format == "libsvm" else len(block.lines_R)
    except UnusableLogsError:
        if span.begin >= 0:
            raise
        return Counted(begin=-1, end=-1, rows=0, lines=0)
    return Counted(begin=begin, end=stream.offset, rows=rows, lines=stream.line - span.line)


def _numbered(source: SourceConfig, spans: Sequence[Span], counts: Sequence[Counted]) -> Iterator[Span]:
    """Spans with their first record's place; one that begins elsewhere than was guessed is counted again."""
    begin, line, row = 0, 1, 0
    for span, counted in zip(spans, counts, strict=True):
        span = span.model_copy(update={"begin": begin, "line": line, "row": row})
        if span.first and counted.begin != begin:
            counted = count_span(Uncounted(source=source, span=span))
        yield span
        named = not span.first and source.format == "csv" and source.header is True
        begin, line, row = counted.end, line + counted.lines, row + counted.rows - named


def pieces_of_spans(spans: Sequence[Sequence[Span]], digests: Sequence[str]) -> list[Piece]:
    """Neighbouring spans together, up to a piece; a file in several spans shares its pieces with no other."""
    most = piece_bytes(sum(span.bytes for of_file in spans for span in of_file))
    held: list[list[tuple[int, Span]]] = []
    room = 0
    for number, of_file in enumerate(spans):
        for span in of_file:
            if not held or len(of_file) > 1 or span.bytes > room:
                held.append([])
                room = most
            held[-1].append((number, span))
            room = room - span.bytes if len(of_file) == 1 else 0
    return [
        Piece(
            number=number,
            of=len(held),
            spans=tuple(span for _, span in piece),
            files=tuple(file for file, _ in piece),
            sha256=tuple(digests[file] for file, _ in piece),
        )
        for number, piece in enumerate(held)
    ]

"""The rows of a range of ids through all layers of a checkpoint: of each id what the newest layer says.

Blocks of different layers have different edges. Between two neighbouring edges every layer has at most one block of
each kind, so only those are held at a time: memory is bounded by a block of each layer, whatever the table's size.

Dims: n ids of a piece, K numbers per row, Z numbers of optimizer state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from des_core.checkpoint import manifest as manifests
from des_core.checkpoint.blocks import PREFIX_BITS, PREFIXES, Block, BlockReader, numbers
from des_core.checkpoint.manifest import Manifest
from des_core.contracts import Reference

Array = np.ndarray[Any, np.dtype[Any]]

GONE, WAITING, ROWS = range(3)
RANK = {"gone": GONE, "waiting": WAITING, "weights": ROWS}
"""Of what one layer says of an id, the highest counts: it may have gone, come back to wait, and been admitted."""


@dataclass(frozen=True)
class Rows:
    """Rows with ascending ids."""

    ids: Array
    """int64 [n]; they ascend as unsigned numbers."""
    last: Array
    """The newest step that looked each id up, uint32 [n]."""
    rows_nK: Array
    counts: Array
    """Lookups of each id, uint32 [n]; of no length where training state was not asked for, as the next."""
    state_nZ: Array


@dataclass(frozen=True)
class Waiting:
    """Ids that wait for admission, ascending, as ``Rows`` has them."""

    ids: Array
    last: Array
    counts: Array


class Layers:
    """The rows of a checkpoint, by ranges of ids.

    Args:
        reference: of the manifest.
        manifest: what it says.
        state: whether training state and waiting ids are read too.

    Raises:
        CheckpointError: a layer's directory is missing or damaged.
    """

    def __init__(self, reference: Reference, manifest: Manifest, state: bool = True) -> None:
        self._state = state
        self._readers: list[BlockReader] = []
        self._blocks: dict[str, list[list[tuple[Block, Block | None, BlockReader]]]] = {}
        self.form = (0, 0, "float32")
        """Numbers per row, numbers of optimizer state, and their type."""
        for depth, layer in enumerate(manifest.layers):
            for reader, blocks in manifests.readers(reference, layer):
                self._readers.append(reader)
                self.form = reader.form
                states = {(block.table, block.first): block for block in blocks if block.kind == "state"}
                for block in blocks:
                    if block.kind == "state" or (block.kind == "waiting" and not state):
                        continue
                    side = states[block.table, block.first] if block.kind == "weights" and state else None
                    layers = self._blocks.setdefault(block.table, [[] for _ in manifest.layers])
                    layers[depth].append((block, side, reader))

    @property
    def read_bytes(self) -> int:
        """Bytes of blocks read so far."""
        return sum(reader.read_bytes for reader in self._readers)

    def between(self, table: str, first: int = 0, last: int = PREFIXES - 1) -> Iterator[tuple[Rows, Waiting]]:
        """Rows and waiting ids of a table whose prefixes lie from ``first`` to ``last``, piece by piece, ascending.

        Raises:
            CheckpointError: a block is missing or has other bytes than were written.
        """
        layers = [
            sorted(
                (entry for entry in entries if entry[0].first <= last and entry[0].last >= first),
                key=lambda entry: entry[0].first,
                reverse=True,
            )
            for entries in self._blocks.get(table, [])
        ]
        held: list[_Held] = []
        for start, stop in _intervals(layers, first, last):
            held = [block for block in held if block.last >= start]
            for depth, coming in enumerate(layers):
                while coming and coming[-1][0].first < stop:
                    held.append(_Held(*coming.pop(), depth))
            yield self._newest([block.cut(start, stop) for block in held])

    def _newest(self, parts: list[_Part]) -> tuple[Rows, Waiting]:
        """Of each id the part of the highest rank."""
        if len(parts) > 1:
            parts = _without_older(parts)
        rows, waiting = (
            [part for part in parts if part.rank % 3 == kind and len(part.ids)] for kind in (ROWS, WAITING)
        )
        if len(rows) == 1 and not waiting:
            return rows[0].as_rows(), Waiting(*_none(3))
        ids = np.concatenate([part.ids for part in rows] or _none(1))
        order = np.argsort(ids.view(np.uint64), kind="stable")
        columns = [
            np.concatenate([part.columns[at] for part in rows])[order] if rows and len(rows[0].columns[at]) else none
            for at, none in enumerate((*_none(1), np.zeros((0, 0)), *_none(1), np.zeros((0, 0))))
        ]
        waits = np.concatenate([part.ids for part in waiting] or _none(1))
        turn = np.argsort(waits.view(np.uint64), kind="stable")
        kept = [np.concatenate([part.columns[at] for part in waiting] or _none(1))[turn] for at in (0, 2)]
        return Rows(ids[order], *columns), Waiting(waits[turn], *kept)


@dataclass(frozen=True)
class _Part:
    """What one block says of the ids of an interval: columns last, rows, counts, state as far as there are any."""

    rank: int
    ids: Array
    columns: tuple[Array, Array, Array, Array]

    def as_rows(self) -> Rows:
        return Rows(self.ids, *self.columns)

    def where(self, chosen: Array) -> _Part:
        return _Part(
            self.rank,
            self.ids[chosen],
            tuple(column[chosen] if len(column) else column for column in self.columns),  # type: ignore[arg-type]
        )


class _Held:
    """A block in memory."""

    def __init__(self, block: Block, side: Block | None, reader: BlockReader, depth: int) -> None:
        self.last = block.last
        self._rank = 3 * depth + RANK[block.kind]
        batch = reader.batch(block)
        columns = {name: numbers(batch.column(name)) for name in batch.schema.names}
        if side is not None:
            more = reader.batch(side)
            columns |= {name: numbers(more.column(name)) for name in more.schema.names}
        self._ids = columns["id"]
        length = len(self._ids)
        # A rule without state has rows of no numbers, and as many of them.
        state = columns.get("state", np.zeros((length if side is not None else 0, 0), np.float32))
        empty = np.empty(0, np.uint32)
        self._columns = (columns.get("last", empty), columns.get("row", empty), columns.get("count", empty), state)

    def cut(self, start: int, stop: int) -> _Part:
        shift = np.uint64(64 - PREFIX_BITS)
        low = np.searchsorted(self._ids, np.uint64(start) << shift)
        high = len(self._ids) if stop >= PREFIXES else np.searchsorted(self._ids, np.uint64(stop) << shift)
        columns = tuple(column[low:high] if len(column) else column for column in self._columns)
        return _Part(self._rank, self._ids[low:high].view(np.int64), columns)  # type: ignore[arg-type]


def _intervals(layers: list[Any], first: int, last: int) -> list[tuple[int, int]]:
    """The range cut at every block's edges: from, up to but not with."""
    edges = {first, last + 1}
    for entries in layers:
        for block, _, _ in entries:
            edges |= {max(block.first, first), min(block.last, last) + 1}
    ordered = sorted(edges)
    return list(zip(ordered[:-1], ordered[1:], strict=True))


def _without_older(parts: list[_Part]) -> list[_Part]:
    """The parts without the ids of which another part of higher rank tells, and without those that are gone."""
    ids = np.concatenate([part.ids for part in parts]).view(np.uint64)
    rank = np.repeat([part.rank for part in parts], [len(part.ids) for part in parts])
    order = np.lexsort((rank, ids))
    newest = np.ones(len(ids), np.bool_)
    newest[:-1] = ids[order][1:] != ids[order][:-1]
    kept = np.zeros(len(ids), np.bool_)
    kept[order[newest]] = True
    ends = np.cumsum([len(part.ids) for part in parts])
    return [
        part.where(kept[end - len(part.ids) : end])
        for part, end in zip(parts, ends.tolist(), strict=True)
        if part.rank % 3 != GONE
    ]


def _none(many: int) -> list[Array]:
    return [np.empty(0, np.int64) for _ in range(many)]

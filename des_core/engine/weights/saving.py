"""Checkpoints written in the background while training goes on, and loaded by any number of workers.

At a pause every worker takes a snapshot of its rows and goes on; a thread of each writes them, and that of worker 0,
when all are done, the manifest. Rows are keyed by id, which stands for (table, key), never by slot, and placement is
by ranges of ids: each worker reads its own ranges, whoever wrote them. Randomness is counters of seed, step and
epoch, so the manifest's cursor is its whole state.

A save is a delta where a checkpoint is known that it can add to, and where that is worth it: the rows that were
looked up since then, and the ids that are gone. Else it is whole. One that fails, as on a full disk, is said;
training goes on, and the next save holds what it should have held.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from des_core import log, storage
from des_core.checkpoint import manifest as manifests
from des_core.checkpoint.blocks import PREFIX_BITS, BlockWriter, Written
from des_core.checkpoint.layers import Layers
from des_core.checkpoint.manifest import DENSE, DENSE_STATE, Last, Layer, Manifest, Shape
from des_core.checkpoint.ordering import sorted_blocks
from des_core.contracts import Record, Reference
from des_core.data.feed.batches import BUCKET_BITS
from des_core.engine.weights.optimizer import DenseRule
from des_core.engine.weights.snapshot import Snapshot
from des_core.engine.weights.table import Table
from des_core.errors import CheckpointError, DesError, StorageError, of_system

Array = np.ndarray[Any, np.dtype[Any]]

MOST_DELTAS = 8
"""Deltas after a whole layer: each is one more place to look an id up when serving."""
DELTA_SHARE = 0.5
"""Deltas hold no more rows than this share of all, or the next save is whole."""
POLL_S = 0.05
TEXT_BYTES = 500
"""Of a failure, as the other workers hear of it."""
LISTED = 1 << 16
"""Ids of a block of waiting or gone ones."""


class Marker(Record):
    """``saved-WORKER.json``: a worker has written its part of a save; deleted when the manifest is there."""

    save: str
    """Number of the attempt, drawn by worker 0: a marker of an earlier one may lie here."""
    written: Written


class Saver:
    """One worker's part in the checkpoints of a run.

    Args:
        folder: address of the run's checkpoints.
        peers: the other workers.
    """

    def __init__(self, folder: str, peers: Any) -> None:
        self._folder, self._peers = folder, peers
        self.base: tuple[Reference, Manifest] | None = None
        """The checkpoint that the next save may add to."""
        self._save: _Save | None = None
        self._lost: list[tuple[Array, Array]] | None = []
        """Ids that went since ``base``, as far as the save that is under way knows; None: nobody keeps a list."""
        self._error: DesError | None = None
        self.spent = dict.fromkeys(("saves", "pause_s", "write_s", "written_bytes"), 0.0)
        """Of this worker since the start: seconds that training stood still, seconds of writing, bytes of weights."""

    def goes_on_from(self, reference: Reference, manifest: Manifest) -> None:
        """Let the next save add to this checkpoint, from which all rows were loaded, if it lies beside the run's."""
        if manifests.run_folder(reference).rpartition("/")[0] == self._folder.rpartition("/")[0]:
            self.base = reference, manifest

    def begin(
        self,
        table: Table,
        model: nn.Module,
        dense: DenseRule,
        head: dict[str, Any],
        measured: dict[str, Any],
        keep: Callable[[str], set[str]],
    ) -> str:
        """Start to write a checkpoint of what is now; the address that its manifest will have. All workers call it.

        Args:
            head: the manifest's fields other than ``workers``, ``layers`` and ``files``.
            measured: goes beside the manifest, so that equal runs have equal digests.
            keep: the manifests that stay when the one of this address is there.
        """
        self.settle()
        start = time.perf_counter()
        gone = None if self._lost is None else table.take_gone(self._lost)
        base = self._chosen(table, head, gone)
        snapshot = table.snapshot(base[1].step if base else 0)
        step = head["trainer"]["step"]
        uri = manifests.manifest_uri(self._folder, step)
        if self._peers.rank == 0:
            storage.delete(uri)
        # A barrier too: nobody writes before the manifest that stood there is gone.
        number = torch.zeros(1, dtype=torch.int64)
        if self._peers.rank == 0:
            number[0] = secrets.randbits(48)
        number = self._total(number)
        waiting = table.candidates
        chosen = waiting.last > (base[1].step if base else 0) if base else np.ones(waiting.used, np.bool_)
        self._save = save = _Save(
            folder=uri.rpartition("/")[0],
            number=f"{int(number):x}",
            rank=self._peers.rank,
            workers=self._peers.workers,
            snapshot=snapshot,
            waiting=tuple(a[chosen].copy() for a in (waiting.ids, waiting.tables, waiting.last, waiting.counts)),
            gone=(gone or []) if base else [],
            shape=head["shape"],
            base=base,
        )
        if self._peers.rank == 0:
            save.files = {DENSE: dense_bytes(model), DENSE_STATE: dense_state_bytes(dense)}
            save.head, save.measured, save.keep = head, measured, keep(uri)
        self._lost = gone
        self.spent["pause_s"] += time.perf_counter() - start
        save.start()
        return uri

    def settle(self) -> bool:
        """Whether the save that was begun last is whole, or there was none; waits for it. All workers call it."""
        save = self._save
        if save is None:
            return True
        start = time.perf_counter()
        save.own.wait()
        error = self._agreed(save.error)
        if error is not None:
            save.abandoned.set()
        save.join()
        committed = bool(self._total(torch.tensor([int(save.manifest is not None)], dtype=torch.int64)))
        self.spent["pause_s"] += time.perf_counter() - start
        self.spent["write_s"] += save.seconds
        if committed:
            self.spent["saves"] += 1
            self.spent["written_bytes"] += save.written.size if save.written else 0
            self.base = self._read(save)
            self._lost = []
        self._save = None
        self._error = error or save.error
        return committed

    def finish(self) -> None:
        """Wait for the last save.

        Raises:
            DesError: it failed, here or on another worker.
        """
        if not self.settle():
            raise self._error or StorageError(f"{self._folder}: worker 0 could not write the checkpoint's manifest")

    def abandon(self) -> None:
        """Leave a save that is under way, for training has failed."""
        if self._save is not None:
            self._save.abandoned.set()

    def _read(self, save: _Save) -> tuple[Reference, Manifest]:
        """The new checkpoint, as worker 0 wrote it."""
        uri = storage.join(save.folder, "manifest.json")
        reference = manifests.reference(uri)
        return reference, manifests.read(reference)

    def _chosen(
        self, table: Table, head: dict[str, Any], gone: list[tuple[Array, Array]] | None
    ) -> tuple[Reference, Manifest] | None:
        """The checkpoint that a save adds to; None where it is whole."""
        base = self.base
        usable = base is not None and gone is not None and base[1].shape == head["shape"]
        usable = usable and base is not None and base[1].step < head["trainer"]["step"]
        since = base[1].step if usable and base is not None else 0
        changed = int(np.count_nonzero(table.last > since)) if usable else 0
        unable, changed, used = self._total(torch.tensor([int(not usable), changed, table.used])).tolist()
        if unable or base is None or len(base[1].layers) > MOST_DELTAS:
            return None
        before = sum(layer.rows for layer in base[1].layers[1:])
        return base if before + changed <= DELTA_SHARE * used else None

    def _agreed(self, mine: DesError | None) -> DesError | None:
        """The failure of the first worker that has one, known to all; its own where a worker has one."""
        failed = torch.zeros(self._peers.workers, dtype=torch.int64)
        failed[self._peers.rank] = int(mine is not None)
        failing = self._total(failed).nonzero().flatten().tolist()
        if not failing:
            return None
        text = torch.zeros(TEXT_BYTES, dtype=torch.int64)
        if self._peers.rank == failing[0]:
            said = str(mine).encode()[:TEXT_BYTES]
            text[: len(said)] = torch.tensor(list(said))
        text = self._total(text)
        return mine or StorageError(bytes(text[text > 0].tolist()).decode(errors="replace"))

    def _total(self, mine: Tensor) -> Tensor:
        with self._peers.uncounted():
            total: Tensor = self._peers.all_reduce({"checkpoint": mine.to(self._peers.device)})["checkpoint"]
        return total.cpu()


class _Save(threading.Thread):
    """The writing of one save on one worker."""

    def __init__(
        self,
        folder: str,
        number: str,
        rank: int,
        workers: int,
        snapshot: Snapshot,
        waiting: tuple[Array, ...],
        gone: list[tuple[Array, Array]],
        shape: Shape,
        base: tuple[Reference, Manifest] | None,
    ) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.folder, self._number, self._rank, self._workers = folder, number, rank, workers
        self._snapshot, self._waiting, self._gone, self._shape, self._base = snapshot, waiting, gone, shape, base
        self.files: dict[str, bytes] = {}
        self.head: dict[str, Any] = {}
        self.measured: dict[str, Any] = {}
        self.keep: set[str] = set()
        self.own, self.abandoned = threading.Event(), threading.Event()
        self.written: Written | None = None
        self.error: DesError | None = None
        self.manifest: Reference | None = None
        self.seconds = 0.0

    def run(self) -> None:
        """Write this worker's part, and on worker 0 the manifest when all parts are there."""
        start = time.perf_counter()
        try:
            self.written = self._write()
            marker = Marker(save=self._number, written=self.written)
            marker.write(self._marker(self._rank))
        except DesError as error:
            self.error = error
        except OSError as error:
            self.error = of_system(error)
        except Exception as error:
            self.error = DesError(f"{type(error).__name__}: {error}")
        finally:
            self._snapshot.done.set()
            self.seconds = time.perf_counter() - start
            self.own.set()
        if self._rank == 0 and self.error is None:
            try:
                self._commit()
            except DesError as error:
                self.error = error
            except OSError as error:
                self.error = of_system(error)
        if self.error is not None and not self.abandoned.is_set():
            why = " ".join(str(self.error).split())
            log.emit("not_saved", worker=self._rank, checkpoint=self.folder, why=why, next="the next save tries again")

    def _write(self) -> Written:
        snapshot = self._snapshot
        names = self._shape.tables
        with BlockWriter(self.folder, self._rank, *snapshot.form) as writer:
            for block in snapshot.blocks():
                if self.abandoned.is_set():
                    raise CheckpointError("training has ended with an error before this checkpoint was written")
                table = names[block.table]
                writer.add_rows(table, block.ids, block.last, block.rows_nK, block.counts, block.state_nZ)
            ids, tables, last, counts = self._waiting
            for number, places in sorted_blocks(ids, tables, LISTED):
                writer.add_waiting(names[number], ids[places], last[places], counts[places])
            for number, gone in _by_table(self._gone):
                writer.add_gone(names[number], gone)
            return writer.finish()

    def _marker(self, worker: int) -> str:
        return storage.join(self.folder, f"saved-{worker:05d}.json")

    def _commit(self) -> None:
        """Wait for all workers' parts; write what stands beside them, and the manifest last."""
        parts = [self._part_of(worker) for worker in range(self._workers)]
        if self.abandoned.is_set():
            return
        run, name = self.folder.split("/")[-2:]
        layer = Layer(
            run=run,
            name=name,
            step=self.head["trainer"]["step"],
            rows=sum(part.rows for part in parts),
            gone=sum(part.gone for part in parts),
            size=sum(part.size for part in parts),
            directories=tuple(part.directory for part in parts),
        )
        files = {name: storage.write_bytes(storage.join(self.folder, name), data) for name, data in self.files.items()}
        storage.write_json(storage.join(self.folder, "measured.json"), self.measured)
        before = self._base[1].layers if self._base else ()
        manifest = Manifest(workers=self._workers, layers=(*before, layer), files=files, **self.head)
        reference = manifest.write(storage.join(self.folder, "manifest.json"))
        run_folder = manifests.run_folder(reference)
        Last(checkpoint=str(reference)).write(storage.join(run_folder, "last.json"))
        # From here on the checkpoint counts: what may go wrong below costs only room.
        self.manifest = reference
        kind: dict[str, Any] = {"delta_of": self._base[1].step} if self._base else {}
        log.emit("checkpoint", step=layer.step, **kind, rows=layer.rows, mb=round(layer.size / 1e6, 1))
        try:
            for worker in range(self._workers):
                storage.delete(self._marker(worker))
            manifests.prune(run_folder, self.keep)
        except (DesError, OSError) as error:
            log.emit("not_pruned", folder=run_folder, why=" ".join(str(error).split()))

    def _part_of(self, worker: int) -> Written:
        """What a worker wrote, as soon as it has."""
        uri, wait_s = self._marker(worker), POLL_S
        while not self.abandoned.is_set():
            if storage.exists(uri):
                marker = Marker.read(uri)
                if marker.save == self._number:
                    return marker.written
            self.abandoned.wait(wait_s)
            wait_s = min(2 * wait_s, 1.0)
        return Written(directory="", rows=0, gone=0, size=0)


def _by_table(gone: list[tuple[Array, Array]]) -> Iterator[tuple[int, Array]]:
    """Distinct ids by table, ascending, in pieces."""
    if not gone:
        return
    ids, tables = (np.concatenate(arrays) for arrays in zip(*gone, strict=True))
    for number, places in sorted_blocks(ids, tables, LISTED):
        yield number, np.unique(ids[places].view(np.uint64)).view(np.int64)


def load_rows(
    reference: Reference,
    manifest: Manifest,
    table: Table,
    owner_TH: Array,
    worker: int,
    tables: Array | None = None,
) -> int:
    """Fill a table with the rows whose buckets ``worker`` owns; the bytes that were read for it.

    Args:
        tables: number here of each table of the checkpoint, -1 for one that is left behind; None: they are the same.
    """
    layers = Layers(reference, manifest)
    for number, name in enumerate(manifest.shape.tables):
        here = number if tables is None else int(tables[number])
        if here < 0:
            continue
        for first, last in _runs(owner_TH[here] == worker):
            for rows, waiting in layers.between(name, first, last):
                if len(rows.ids):
                    of = np.full(len(rows.ids), here, np.uint16)
                    table.restore(rows.ids, of, rows.counts, rows.last, np.array(rows.rows_nK), np.array(rows.state_nZ))
                if len(waiting.ids):
                    of = np.full(len(waiting.ids), here, np.uint16)
                    table.restore_candidates(waiting.ids, of, waiting.counts, waiting.last)
    return layers.read_bytes


def _runs(owned_H: Array) -> Iterator[tuple[int, int]]:
    """First and last prefix of each run of owned buckets."""
    shift = PREFIX_BITS - BUCKET_BITS
    edges = np.flatnonzero(np.diff(np.concatenate([[False], owned_H, [False]]).astype(np.int8)))
    for first, stop in edges.reshape(-1, 2).tolist():
        yield first << shift, (stop << shift) - 1


def load_dense(reference: Reference, manifest: Manifest, model: nn.Module, optimizer: DenseRule | None = None) -> None:
    """Fill the dense weights, batch norm's statistics and, if given, their optimizer.

    Raises:
        CheckpointError: a file is missing or has other bytes than the manifest says.
    """
    folder = reference.uri.rpartition("/")[0]
    try:
        weights, state = (
            storage.read_bytes(storage.join(folder, name), manifest.files[name]) if wanted else b""
            for name, wanted in ((DENSE, True), (DENSE_STATE, optimizer is not None))
        )
    except StorageError as error:
        raise CheckpointError(str(error)) from None
    load_dense_bytes(weights, model)
    if optimizer is not None:
        load_dense_state_bytes(state, optimizer)


def dense_bytes(model: nn.Module) -> bytes:
    """dense.safetensors: dense weights and batch norm's statistics."""
    return _packed(dict(model.state_dict()))


def load_dense_bytes(data: bytes, model: nn.Module) -> None:
    """The other way round."""
    model.load_state_dict(safetensors.torch.load(data))


def dense_state_bytes(optimizer: DenseRule) -> bytes:
    """dense-state.safetensors: the dense weights' optimizer, ``NUMBER.NAME`` by the number of the parameter."""
    slots = {f"{number}.{name}": slot for number, slots in optimizer.state.items() for name, slot in slots.items()}
    return _packed(slots)


def load_dense_state_bytes(data: bytes, optimizer: DenseRule) -> None:
    """The other way round."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in safetensors.torch.load(data).items():
        number, name = key.split(".")
        state.setdefault(int(number), {})[name] = tensor
    optimizer.restore(state)


def _packed(tensors: dict[str, Tensor]) -> bytes:
    data: bytes = safetensors.torch.save(
        {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    )
    return data

"""All use of torch.distributed: every collective is made and counted here.

Bytes are those sent to other workers, a collective's by its algorithm: an all-to-all sends what is not
for oneself, an all-reduce 2 (N - 1) / N of its size. A collective that carries several things is
counted line by line from the tensors it is given. One worker takes the same road as many.

Each worker beats through the rendezvous store; one that stops beating, killed or frozen, is named by the
others, which then leave rather than wait. Started by torchrun: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set.
"""

from __future__ import annotations

import math
import os
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from des_core.errors import PeerLostError

PIECE_BYTES = 1 << 19
"""A message on the way is cut into pieces of this size."""
LINK_NUMBERS = 1 << 18
"""Sent to each worker to measure bandwidth."""
BEAT_S = 1.0
BIRTH_S = 300.0
"""For a worker that has not beaten yet: its image may be cold."""
JOIN_S = 2.0
"""For the heartbeat's thread to end: the store may have stopped answering."""
SILENCE_S = 25.0
"""A worker that has not beaten for this long is taken for lost."""


@dataclass
class Ledger:
    """Bytes sent to other workers and seconds spent, by ``entry(line, way)``, since ``clear``."""

    sent_bytes: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def clear(self) -> None:
        """Begin anew."""
        self.sent_bytes.clear()
        self.seconds.clear()

    def book(self, bytes_by_line: dict[str, float], seconds: float, way: str) -> None:
        """Add a collective; its time is shared out by bytes, evenly where nothing was sent."""
        total = sum(bytes_by_line.values())
        for line, count in bytes_by_line.items():
            self.sent_bytes[entry(line, way)] += count
            self.seconds[entry(line, way)] += seconds * (count / total if total else 1 / len(bytes_by_line))


WAYS = ("forward", "backward")
"""With totals, towards the loss; with gradients, away from it."""


def entry(line: str, way: str) -> str:
    """A line of the ledger in one direction."""
    return f"{line}/{way}"


@contextmanager
def _connected() -> Iterator[None]:
    """Tell a connection that broke apart from other failures: another worker's end is its cause."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise PeerLostError(f"the connection to another worker broke ({reason})") from error


class Collectives:
    """This worker's place among its peers, and what it may ask of them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ledger = Ledger()
        self.spent_s = 0.0
        """Inside collectives, all told, as the host sees it: on a GPU it does not wait for them."""
        self.inside: Callable[[], AbstractContextManager[None]] = nullcontext
        """Entered around each collective."""
        backend = "nccl" if device.type == "cuda" else "gloo"
        # Silence is noticed by heartbeats, so a slow but living worker is never cut off.
        dist.init_process_group(backend, timeout=timedelta(hours=2))
        self.rank = dist.get_rank()
        self.workers = dist.get_world_size()

    def close(self) -> None:
        """Close the connections after all workers have arrived here, so that no peer loses one that it still needs."""
        self.barrier()
        dist.destroy_process_group()

    def barrier(self) -> None:
        """Wait for all workers; not counted.

        On a GPU a collective is only enqueued when it returns: the host waits for its result, or files of other
        workers would be taken for written too early.
        """
        arrived = torch.zeros(1, device=self.device)
        with _connected():
            dist.all_reduce(arrived)
        arrived.item()

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Collectives inside, an evaluation's, stay out of the ledger of training."""
        kept, self.ledger = self.ledger, Ledger()
        try:
            yield
        finally:
            self.ledger = kept

    def all_to_all(self, sent: Tensor, send: list[dict[str, int]], receive: list[int], way: str = "forward") -> Tensor:
        """What the workers sent here, flat, in rank order.

        Args:
            sent: flat numbers for worker 0, then for worker 1, and so on.
            send: per destination the numbers sent, by ledger line.
            receive: per source the numbers received.
        """
        if self.workers == 1:
            return sent.reshape(-1)
        sizes = [sum(lines.values()) for lines in send]
        received = sent.new_empty(sum(receive))
        start = time.perf_counter()
        # Bytes, because not every backend carries every type.
        width = sent.element_size()
        to = [size * width for size in sizes]
        come = [size * width for size in receive]
        flat, here = sent.contiguous().view(torch.uint8), received.view(torch.uint8)
        with _connected(), self.inside():
            if self.device.type == "cuda":
                dist.all_to_all_single(here, flat, come, to)
            else:
                self._swap(list(flat.split(to)), list(here.split(come)))
        seconds = time.perf_counter() - start
        self.spent_s += seconds
        counted: dict[str, float] = defaultdict(float)
        for worker, lines in enumerate(send):
            for line, count in lines.items():
                counted[line] += count * sent.element_size() if worker != self.rank else 0
        self.ledger.book(counted, seconds, way)
        return received

    def _swap(self, to: list[Tensor], come: list[Tensor]) -> None:
        """Bytes for each worker out, bytes of each worker in, in pieces that are all under way at once.

        Over a slow link gloo's own all-to-all sends large messages one way after the other; pieces go both ways.
        """
        come[self.rank].copy_(to[self.rank])
        waiting = []
        for peer in (worker for worker in range(self.workers) if worker != self.rank):
            waiting += [dist.irecv(piece, peer) for piece in come[peer].split(PIECE_BYTES) if len(piece)]
            waiting += [dist.isend(piece, peer) for piece in to[peer].split(PIECE_BYTES) if len(piece)]
        for work in filter(None, waiting):
            work.wait()

    def all_reduce(self, parts: dict[str, Tensor], way: str = "forward") -> dict[str, Tensor]:
        """The sum over workers of every tensor, by ledger line, in one collective; the same bits everywhere."""
        flat = torch.cat([part.reshape(-1) for part in parts.values()])
        start = time.perf_counter()
        if self.workers > 1:
            with _connected(), self.inside():
                dist.all_reduce(flat)
        seconds = time.perf_counter() - start
        self.spent_s += seconds
        share = 2 * (self.workers - 1) / self.workers * flat.element_size()
        self.ledger.book({line: share * part.numel() for line, part in parts.items()}, seconds, way)
        pieces = flat.split([part.numel() for part in parts.values()])
        return {line: piece.view(part.shape) for (line, part), piece in zip(parts.items(), pieces, strict=True)}

    def link(self) -> tuple[float, float]:
        """Bytes per second that a worker sends and seconds of a collective's latency, known to all alike.

        The slowest worker's medians of a few all-to-alls, rounded to powers of two: runs on one machine agree.
        """
        if self.workers == 1:
            return 1e12, 0.0
        with self.uncounted():
            small = self._median_s(numbers=1, times=20)
            large = self._median_s(numbers=LINK_NUMBERS, times=5)
            mine = torch.zeros(2, self.workers, dtype=torch.float64, device=self.device)
            mine[:, self.rank] = torch.tensor([small, large], dtype=torch.float64)
            slowest = self.all_reduce({"link": mine})["link"].max(1).values.tolist()
        latency_s, large_s = (2.0 ** round(math.log2(seconds)) for seconds in slowest)
        sent = 4 * LINK_NUMBERS * (self.workers - 1)
        return sent / max(large_s - latency_s, large_s / 2), latency_s

    def _median_s(self, numbers: int, times: int) -> float:
        """Seconds of an all-to-all that sends ``numbers`` to each worker."""
        sent = torch.zeros(numbers * self.workers, device=self.device)
        took = []
        for _ in range(times):
            start = time.perf_counter()
            self.all_to_all(sent, [{"link": numbers}] * self.workers, [numbers] * self.workers).sum().item()
            took.append(time.perf_counter() - start)
        return statistics.median(took)

    def gather(self, rows: Tensor) -> list[Tensor]:
        """On worker 0 every worker's ``rows`` [n_w, ...], in rank order; elsewhere empty. Under ``uncounted``."""
        counts = torch.zeros(self.workers, dtype=torch.int64, device=self.device)
        counts[self.rank] = rows.shape[0]
        sizes = [int(n) for n in self.all_reduce({"sizes": counts})["sizes"]]
        each = rows[:1].numel() or rows.new_empty(1, *rows.shape[1:]).numel()
        send = [{"rows": rows.numel() if worker == 0 else 0} for worker in range(self.workers)]
        receive = [size * each if self.rank == 0 else 0 for size in sizes]
        flat = self.all_to_all(rows.reshape(-1), send, receive)
        if self.rank:
            return []
        return [piece.view(-1, *rows.shape[1:]) for piece in flat.split(receive)]


@contextmanager
def heartbeat(lost: Callable[[int, float], None]) -> Iterator[None]:
    """Beat while the block runs, and call ``lost(worker, silent seconds)`` when a heart stopped.

    Each worker watches the next one, so a beat costs two calls of the store whatever the number of workers. The store
    lives in a launcher's process; where that, or its machine, stops answering, ``lost`` is called with worker -1.
    """
    rank, workers = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=SILENCE_S),
    )
    # Whoever has begun to work has beaten once: a worker without a beat is waited for as one that is still starting.
    store.add(f"des/beat/{rank}", 1)
    ended = threading.Event()
    # What the store last said, and when: its own time limit does not hold where its process is frozen.
    answered = [time.monotonic()]
    watched = (rank + 1) % workers

    def beat() -> None:
        seen, since = -1, time.monotonic()
        while not ended.wait(BEAT_S):
            try:
                store.add(f"des/beat/{rank}", 1)
                count = store.add(f"des/beat/{watched}", 0)
            except RuntimeError:
                # The store is gone, which the other thread tells of in its time.
                return
            now = answered[0] = time.monotonic()
            if count != seen:
                seen, since = count, now
            elif now - since > (SILENCE_S if count else BIRTH_S):
                lost(watched, now - since)
                return

    def guard() -> None:
        while not ended.wait(BEAT_S):
            silent_s = time.monotonic() - answered[0]
            if silent_s > SILENCE_S:
                lost(-1, silent_s)
                return

    threads = [threading.Thread(target=target, daemon=True, name="heartbeat") for target in (beat, guard)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        # A thread inside the store's C++ while the interpreter goes down would abort the process, so it is waited
        # for; but not for ever, where the store has stopped answering.
        ended.set()
        for thread in threads:
            thread.join(JOIN_S)

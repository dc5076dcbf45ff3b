"""Systems that train the same case: one file each, in the order in which they are shown.

A system's file has ``build(case, folder, rank, **options)``, which returns an object with

    train(first, count)   steps on global batches [first, first + count), one after another
    score()               logits [b] of batch 0's home slice, with the weights as they are
    facts()               what the report should know: by name, as JSON
    close()               leave together with the other workers
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from benchmarks.peers.case import Case


class System(Protocol):
    """One process of a system."""

    def train(self, first: int, count: int) -> None: ...

    def score(self) -> Tensor: ...

    def facts(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Listing:
    """Where a system is built, and what it claims."""

    file: str
    says: str
    options: dict[str, Any] = field(default_factory=dict)
    single: bool = False
    """One process, whatever the case's number of workers: what scaling is measured against."""
    synchronous: bool = True
    needs_peers: bool = False
    """Whether it needs benchmarks/requirements.txt."""


SYSTEMS = {
    "des": Listing("des", "DES"),
    "table_wise": Listing("torchrec_sharded", "TorchRec table-wise", {"sharding": "table_wise"}, needs_peers=True),
    "row_wise": Listing("torchrec_sharded", "TorchRec row-wise", {"sharding": "row_wise"}, needs_peers=True),
    "server": Listing("parameter_server", "synchronous PS", {"synchronous": True}),
    "server_async": Listing("parameter_server", "asynchronous PS", {"synchronous": False}, synchronous=False),
    "sparse": Listing("sparse_embedding", "DDP, sparse nn.Embedding"),
    "tbe": Listing("fbgemm", "FBGEMM TBE, one process", single=True, needs_peers=True),
    "embedding": Listing("sparse_embedding", "nn.Embedding, one process", single=True),
    "reference": Listing("plain", "torch, double precision", single=True),
}


def workers_of(name: str, case: Case) -> int:
    """Processes of a system in a case."""
    return 1 if SYSTEMS[name].single else case.workers


def build(name: str, case: Case, folder: Path, rank: int) -> System:
    """One process of a system, ready to train."""
    listing = SYSTEMS[name]
    module = importlib.import_module(f"{__name__}.{listing.file}")
    system: System = module.build(case, folder, rank, workers_of(name, case), **listing.options)
    return system

"""No process holds more than its share and a fixed buffer: under a hard limit on memory, set before the work begins.

The limit is RLIMIT_DATA, which counts what a process could write to: its heap, and anonymous pages, touched or not.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from des_core import storage
from des_core.checkpoint import manifest as manifests
from des_core.checkpoint.blocks import BlockWriter
from des_core.checkpoint.manifest import Layer
from des_core.contracts import Reference
from des_core.data.feed.batches import ids_of
from tests.checkpoint.histories import manifest_of

ROWS, K, Z = 2_000_000, 17, 1
BLOCK = 10_000
BUFFER_MB = 48
"""Blocks, Arrow's pools, and arrays that grow by a quarter."""

LIMITED = """
import resource, sys
import numpy as np, torch
from des_core.checkpoint import compaction, verification
from des_core.checkpoint import manifest as manifests
from des_core.contracts import Reference
from des_core.config import TableConfig
from des_core.engine.weights.exporting import export_parquet
from des_core.engine.weights.saving import load_rows
from des_core.engine.weights.table import Table

what, reference, limit_mb = sys.argv[1], Reference.parse(sys.argv[2]), int(sys.argv[3])

def table():
    return Table(17, 1, 0, 0.1, TableConfig(), torch.device("cpu"), torch.float32)

def load(workers):
    owner_TH = np.arange(512).reshape(2, 256) * workers // 512
    mine = table()
    print(load_rows(reference, manifests.read(reference), mine, owner_TH, 0), mine.used)

def silent(name, rows): pass

work = {
    "share": lambda: load(4),
    "all": lambda: load(1),
    "compact": lambda: print(compaction.compact(reference, silent)),
    "verify": lambda: print(len(verification.verify(reference).faults)),
    "export": lambda: export_parquet(reference, [], sys.argv[4], silent),
}
# What is compiled and imported counts before.
t = table()
one = [np.ones(1, kind) for kind in (np.int64, np.uint16, np.uint32, np.uint32)]
t.restore(*one, np.ones((1, 17), "f"), np.ones((1, 1), "f"))
import io
import pyarrow as pa
import pyarrow.parquet
# Stacks of threads count too.
pyarrow.parquet.write_table(pa.table({"a": [1]}), io.BytesIO())
held = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (held + (limit_mb << 20),) * 2)
work[what]()
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Reference, int]:
    """A checkpoint of 2M rows in two tables, with a delta, and the bytes of all weights and state."""
    root = tmp_path_factory.mktemp("large")
    generator = np.random.default_rng(0)
    layers = []
    for step, rows in ((1, ROWS), (2, ROWS // 50)):
        name = manifests.folder_name(step)
        with BlockWriter(storage.join(str(root), "run", name), 0, K, Z, "float32") as writer:
            for table in ("a", "b"):
                ids = np.sort(ids_of(np.arange(rows // 2), table).view(np.uint64)).view(np.int64)
                prefix = ids.view(np.uint64) >> np.uint64(48)
                start = 0
                while start < len(ids):
                    end = min(start + BLOCK, len(ids))
                    stop = int(np.searchsorted(prefix, prefix[end - 1], side="right"))
                    many, counts = stop - start, np.full(stop - start, step, np.uint32)
                    rows_nK = generator.random((many, K), np.float32)
                    writer.add_rows(table, ids[start:stop], counts, rows_nK, counts, rows_nK[:, :Z])
                    start = stop
            part = writer.finish()
        layers.append(
            Layer(run="run", name=name, step=step, rows=part.rows, size=part.size, directories=(part.directory,))
        )
    manifest = manifest_of(tuple(layers), 2)
    return manifest.write(manifests.manifest_uri(str(root / "run"), 2)), ROWS * 4 * (K + Z + 4)


def limited(what: str, reference: Reference, limit_mb: float, *more: str) -> subprocess.CompletedProcess[str]:
    """Do something in a process that may take so much more memory than it has when it begins."""
    words = [sys.executable, "-c", LIMITED, what, str(reference), str(round(limit_mb)), *more]
    # Arrow's own pool reserves far more than it uses.
    environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}
    root = Path(__file__).parent.parent.parent
    return subprocess.run(words, capture_output=True, text=True, cwd=root, env=environment)


def test_a_worker_loads_its_share_in_its_share_of_memory(large: tuple[Reference, int]) -> None:
    reference, weights = large
    # A quarter of the rows, an index of them at its lowest load, and growth by a quarter.
    share_mb = 1.25 * (weights / 4 + ROWS / 4 * 2 * 8 / 0.6) / (1 << 20) + BUFFER_MB
    assert share_mb < 0.85 * weights / (1 << 20)
    done = limited("share", reference, share_mb)
    assert done.returncode == 0, done.stderr
    read, rows = map(int, done.stdout.split())
    assert rows == pytest.approx(ROWS / 4, rel=0.02) and read < 1.1 * 1.02 * weights / 4
    assert limited("all", reference, share_mb).returncode != 0, "the limit holds"


@pytest.mark.parametrize("what", ["verify", "compact", "export"])
def test_tools_hold_a_block_of_each_layer(large: tuple[Reference, int], tmp_path: Path, what: str) -> None:
    reference, weights = large
    assert weights / (1 << 20) > 2 * BUFFER_MB
    done = limited(what, reference, BUFFER_MB, str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]

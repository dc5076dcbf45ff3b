"""Checkpoints of random histories: rows and waiting ids that come, change, go and come back, layer by layer."""

from __future__ import annotations

from typing import Any

import numpy as np

from des_core import storage
from des_core.checkpoint import manifest as manifests
from des_core.checkpoint.blocks import PREFIXES, BlockWriter, prefixes
from des_core.checkpoint.manifest import Layer, Manifest, Shape
from des_core.checkpoint.ordering import sorted_blocks
from des_core.contracts import Reference
from des_core.engine.weights.snapshot import HostRows, Snapshot

TABLES = ("a", "b")
SHAPE = Shape(model={}, optimizer={}, fields=TABLES, tables=TABLES, precision="fp32")
K, Z = 3, 2

Known = dict[tuple[int, int], tuple[str, Any]]
"""(table, id) -> ("row", numbers) or ("waits", count)."""


def ids_of(generator: np.random.Generator, many: int) -> np.ndarray:
    """Distinct ids, many of them of the same prefixes."""
    wide = generator.integers(-(1 << 63), 1 << 63, many)
    near = (generator.integers(0, 7, many) << 60) + generator.integers(0, 1 << 20, many)
    return np.unique(np.concatenate([wide, near]))


def write_layer(root: str, name: str, step: int, known: Known, gone: set[tuple[int, int]], workers: int) -> Layer:
    """A layer of so many writers, each with a piece of the line of ids."""
    parts = []
    edges = np.linspace(0, PREFIXES * len(TABLES), workers + 1).astype(int)
    for worker in range(workers):

        def mine(place: tuple[int, int], worker: int = worker) -> bool:
            line = place[0] * PREFIXES + int(prefixes(np.array([place[1]], np.int64))[0])
            return bool(edges[worker] <= line < edges[worker + 1])

        rows = [place for place, (kind, _) in known.items() if kind == "row" and mine(place)]
        waits = [place for place, (kind, _) in known.items() if kind == "waits" and mine(place)]
        numbers = np.array([known[place][1] for place in rows], np.float32).reshape(-1, K + Z)
        ids, tables = (np.array([place[at] for place in rows], kind) for at, kind in ((1, np.int64), (0, np.uint16)))
        source = HostRows(ids, numbers[:, :K].copy(), numbers[:, K:].copy())
        counts = numbers[:, 0].astype(np.uint32)
        snapshot = Snapshot(source, tables, counts, np.full(len(ids), step, np.uint32), 0)
        with BlockWriter(storage.join(root, "run", name), worker, K, Z, "float32") as writer:
            for block in snapshot.blocks():
                numbers_of = (block.ids, block.last, block.rows_nK, block.counts, block.state_nZ)
                writer.add_rows(TABLES[block.table], *numbers_of)
            for places, add in ((waits, "waiting"), ([place for place in gone if mine(place)], "gone")):
                ids, tables = (np.array([p[at] for p in places], kind) for at, kind in ((1, np.int64), (0, np.uint16)))
                for table, chosen in sorted_blocks(ids, tables, 5):
                    if add == "gone":
                        writer.add_gone(TABLES[table], ids[chosen])
                    else:
                        count = np.array([known[table, int(one)][1] for one in ids[chosen]], np.uint32)
                        writer.add_waiting(TABLES[table], ids[chosen], np.full(len(count), step, np.uint32), count)
            parts.append(writer.finish())
    sums = {key: sum(getattr(part, key) for part in parts) for key in ("rows", "gone", "size")}
    return Layer(run="run", name=name, step=step, directories=tuple(part.directory for part in parts), **sums)


def history(root: str, seed: int, depth: int, many: int) -> tuple[Reference, Manifest, Known]:
    """A checkpoint of several layers, and what is known at its end."""
    generator = np.random.default_rng(seed)
    every = [(table, int(one)) for table in range(len(TABLES)) for one in ids_of(generator, many)]
    whole: Known = {}
    layers = []
    for step in range(1, depth + 1):
        changed, gone = {}, set()
        for place in every:
            draw = generator.random()
            if draw < 0.15 and place in whole:
                gone.add(place)
                whole.pop(place)
            if draw < 0.05 or (draw > 0.6 and place not in whole):
                # What has gone may come back in the same save.
                changed[place] = ("waits", int(generator.integers(1, 9)))
            elif 0.3 < draw < 0.6:
                changed[place] = ("row", generator.random(K + Z).astype(np.float32).tolist())
        whole |= changed
        name, workers = manifests.folder_name(step), int(generator.integers(1, 4))
        written = changed if layers else dict(whole)
        layers.append(write_layer(root, name, step, written, gone if layers else set(), workers))
    manifest = manifest_of(tuple(layers), depth)
    uri = manifests.manifest_uri(storage.join(root, "run"), depth)
    return manifest.write(uri), manifest, whole


def manifest_of(layers: tuple[Layer, ...], step: int, **changes: Any) -> Manifest:
    """A manifest of the layers with no dense part."""
    trainer = {"step": step, "decays": [], "epoch": 0}
    return Manifest(
        **{"run_key": "k", "trajectory": "t", "shape": SHAPE, "workers": 1, "trainer": trainer, "files": {}}
        | {"layers": layers}
        | changes
    )

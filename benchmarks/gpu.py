"""Is a GPU worth it? DES on one device beside plain PyTorch that is given row numbers.

    PYTHONPATH=. python benchmarks/gpu.py [--models deepfm fm lr dcn_v2 dlrm] [--batches 65536 8192] [--rounds 5]

Prints key=value lines: the card and its copy bandwidth; whether the systems train the same model and two runs of the
kernels have the same bits; for each model and batch the samples per second of

    plain    nn.Embedding(sparse=True) of all fields merged, torch.optim.Adagrad, the same towers; row numbers given
    torch    DES with train.kernels = "torch": ids on the CPU, rows on the device (of the first model and batch)
    triton   DES with train.kernels = "triton": ids and rows on the device, every kernel launched by the host
    graphs   the same, its steps captured in CUDA graphs and replayed

in turns, and the ratios to plain (median of the turns, with least and most); then, by a profile of the device, the
phases of a step, its kernel launches and synchronisations, and the bytes that rows and their sums must move against
what a copy reaches; and what the kernels of ids and rows reach by themselves. All rows are live before the first step.
Keys and labels start in host memory for everyone; no Parquet is decoded inside the clock.

A machine without a package index that has torch, Triton, numba and pyarrow needs pydantic and safetensors beside
them: fetch their wheels elsewhere (pip download --no-deps pydantic pydantic-core annotated-types typing-inspection
safetensors, for its Python) and put them on PYTHONPATH. Without a GPU nothing here says anything of speed;
TRITON_INTERPRET=1 with --rows 200 --batches 64 --rounds 1 runs every line of it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "8")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from des_core import log, storage
from des_core.config import Config, parse_config
from des_core.contracts import FILE, LABEL, ROW, Dataset, FieldSpec, FieldStats, Part, Reference, RowsFile, Segment
from des_core.data.feed.batches import ids_of
from des_core.data.feed.prefetch import ahead
from des_core.data.store.parts import footer_of
from des_core.engine.exchange.collectives import Collectives
from des_core.engine.profile import WATCHED, CudaClock, Profile
from des_core.engine.worker import Worker, worker_of
from des_core.run import pin

FACTORS, HIDDEN, RATE, EPS, ZIPF = 16, (256, 128), 0.01, 1e-6, 1.05
GATE_STEPS, GATE_BATCH, GATE_ROWS = 6, 32, 100
FILL = 1 << 18
WARM = 6
"""Steps until kernels are compiled and steps captured."""


def emit(event: str, **fields: object) -> None:
    """One line of the result."""
    log.emit(event, to=sys.stdout, **fields)


def names(fields: int) -> list[str]:
    """Names of the fields."""
    return [f"f{number:02}" for number in range(fields)]


def config_of(
    model: str, batch: int, fields: int, device: str, kernels: str, folder: Path, graphs: bool = True
) -> Config:
    """The run of DES."""
    rule = {"name": "adagrad", "learning_rate": RATE, "eps": EPS}
    return parse_config(
        {
            "run": {"name": "gpu", "seed": 7, "dir": str(folder)},
            "source": {"format": "parquet", "path": "made-by-the-benchmark"},
            "fields": [{"name": name} for name in names(fields)],
            "model": {"name": model, "factors": FACTORS, "hidden": HIDDEN, "init": 0.01},
            "train": {"batch": batch, "device": device, "kernels": kernels, "exchange": "auto", "graphs": graphs},
            "optimizer": {"rows": rule | {"name": "rowwise_adagrad"}, "dense": rule},
            "storage": {"root": str(folder)},
            "registry": {"tracking_uri": f"sqlite:///{folder}/mlflow.db"},
        }
    )


def dataset_of(config: Config, rows: int, fields: int, folder: Path) -> Reference:
    """A data manifest over one sample: batches are made in memory."""
    (folder / "features" / "all").mkdir(parents=True, exist_ok=True)
    file = folder / "features" / "all" / "data.parquet"
    one = {name: pa.array([0]) for name in names(fields)}
    one |= {LABEL: pa.array([0.0], pa.float32()), FILE: pa.array([0], pa.int32()), ROW: pa.array([0])}
    pq.write_table(pa.table(one), file)
    part = Part(files=(RowsFile(path="all/data.parquet", sha256="", footer=footer_of(str(file)), rows=1),))
    uri = str(folder / "features" / "manifest.json")
    Dataset(
        spec=config.features_digest,
        task="click",
        fields=tuple(FieldSpec(name=name, column=name, kind="categorical", table=name) for name in names(fields)),
        has_group=False,
        has_time=False,
        parts={"all": part},
        splits={split: (Segment(part="all", start=0, stop=1),) for split in ("train", "valid", "test")},
        files=("0" * 16,),
        stats=dict.fromkeys(names(fields), FieldStats(lookups_per_sample=1, missing_share=0, cardinality=rows)),
    ).write(uri)
    return Reference(uri, storage.digest_file(uri))


@cache
def batches_of(batch: int, many: int, rows: int, fields: int, seed: int = 1) -> tuple[list[pa.Table], list[Tensor]]:
    """Batches as tables of keys, and the same keys as row numbers [F, B] of one merged table."""
    draw = np.random.default_rng(seed)
    odds = np.cumsum(np.arange(1, rows + 1, dtype=np.float64) ** -ZIPF)
    places = [draw.permutation(rows) for _ in range(fields)]
    tables, numbers = [], []
    for _ in range(many):
        keys = [place[np.searchsorted(odds, draw.random(batch) * odds[-1])] for place in places]
        columns = dict(zip(names(fields), map(pa.array, keys), strict=True))
        columns[LABEL] = pa.array((draw.random(batch) < 0.25).astype(np.float32))
        tables.append(pa.table(columns))
        numbers.append(torch.from_numpy(np.stack([key + rows * field for field, key in enumerate(keys)])))
    return tables, numbers


class Plain:
    """What a user of PyTorch would write: one merged sparse table, row numbers given."""

    def __init__(self, model: str, rows: int, fields: int, device: torch.device) -> None:
        self._model, self._device = model, device
        self.vectors = nn.Embedding(rows * fields, FACTORS, sparse=True, device=device)
        self.linear = nn.Embedding(rows * fields, 1, sparse=True, device=device)
        nn.init.uniform_(self.vectors.weight, -0.017, 0.017)
        nn.init.zeros_(self.linear.weight)
        inputs = fields * (fields - 1) // 2 if model == "dlrm" else fields * FACTORS
        widths = [inputs, *HIDDEN]
        layers = [part for a, b in zip(widths, widths[1:], strict=False) for part in (nn.Linear(a, b), nn.ReLU())]
        self.tower = nn.Sequential(*layers, nn.Linear(HIDDEN[-1], 1)).to(device)
        size = fields * FACTORS
        self.cross = nn.ModuleList(
            nn.Sequential(nn.Linear(size, 16, bias=False), nn.Linear(16, size)) for _ in range(3)
        ).to(device)
        self.out = nn.Linear(size, 1).to(device)
        tables = [*self.vectors.parameters(), *self.linear.parameters()]
        dense = [*self.tower.parameters(), *self.cross.parameters(), *self.out.parameters()]
        self._rules = [torch.optim.Adagrad(part, lr=RATE, eps=EPS) for part in (tables, dense)]

    def step(self, numbers_FB: Tensor, labels_B: Tensor) -> None:
        """One step on row numbers and labels in pinned memory."""
        numbers = numbers_FB.to(self._device, non_blocking=True).T
        labels = labels_B.to(self._device, non_blocking=True)
        loss = binary_cross_entropy_with_logits(self._logits(numbers), labels)
        for rule in self._rules:
            rule.zero_grad()
        loss.backward()
        for rule in self._rules:
            rule.step()

    def _logits(self, numbers_BF: Tensor) -> Tensor:
        model = self._model
        logits = self.linear(numbers_BF).sum((1, 2))
        if model == "lr":
            return logits
        v = self.vectors(numbers_BF)
        if model in ("fm", "deepfm"):
            logits = logits + 0.5 * (v.sum(1).square() - v.square().sum(1)).sum(1)
        if model in ("deepfm", "dcn_v2"):
            logits = logits + self.tower(v.flatten(1))[:, 0]
        if model == "dlrm":
            pairs = torch.triu_indices(v.shape[1], v.shape[1], 1, device=v.device)
            logits = logits + self.tower((v @ v.mT)[:, pairs[0], pairs[1]])[:, 0]
        if model == "dcn_v2":
            x0 = x = v.flatten(1)
            for layer in self.cross:
                x = x0 * layer(x) + x
            logits = logits + self.out(x)[:, 0]
        return logits


class System:
    """One system with its batches, stepping on in a circle."""

    def __init__(self, train: Callable[[int], None], close: Callable[[], None] = lambda: None) -> None:
        self.train, self.close = train, close


def plain_system(system: Plain, device: torch.device, tables: list[pa.Table], numbers: list[Tensor]) -> System:
    """Plain PyTorch on batches in pinned memory."""
    labels = [torch.from_numpy(table.column(LABEL).to_numpy().copy()) for table in tables]
    if device.type == "cuda":
        numbers, labels = ([tensor.pin_memory() for tensor in tensors] for tensors in (numbers, labels))

    def train(steps: int) -> None:
        for step in range(steps):
            system.step(numbers[step % len(numbers)], labels[step % len(labels)])

    return System(train)


def fill(worker: Worker, rows: int, fields: int) -> None:
    """Make all rows live, as if each had been looked up once before the first step."""
    ownership = worker.ownership
    for number, name in enumerate(names(fields)):
        ids = ids_of(np.arange(rows), name)
        for piece in np.array_split(ids, max(1, rows // FILL)):
            place = ownership.indices.index(number)
            if hasattr(worker.table, "look_up"):
                look_up(worker.table, piece, place, ownership.table_of_piece)
            else:
                tables = np.full(len(piece), ownership.table_of_piece[place], np.uint16)
                worker.table.commit(worker.table.stage(piece, tables, np.ones(len(piece), np.uint32), 0))


def look_up(table: Any, ids: np.ndarray, place: int, table_of_piece: np.ndarray) -> None:
    """Make rows of new ids on a device, all of one field."""
    from des_core.engine.device.batch import control_of

    device, many = table.rows.device, len(ids)
    ids_L = torch.from_numpy(ids).to(device)
    mine_L = torch.ones(many, dtype=torch.int8, device=device)
    piece_L = torch.full((many,), place, dtype=torch.int64, device=device)
    tables = torch.from_numpy(table_of_piece.astype(np.int32)).to(device)
    table.make_room(many)
    table.look_up(ids_L, mine_L, piece_L, tables, control_of(7, 0).to(device))
    table.ask_used()


def des_system(worker: Worker, tables: list[pa.Table]) -> System:
    """DES, with the next batch made ready in a thread."""

    def train(steps: int) -> None:
        batches = (tables[step % len(tables)] for step in range(steps))
        made = worker.ready(batches, worker.steps, None, lambda step: False)
        with contextlib.closing(ahead(made, partial(worker.profile.add, "stall"), worker.lookahead)) as items:
            for item in items:
                worker.step(item, 1.0)  # type: ignore[arg-type]

    return System(train)


def synchronize(device: torch.device) -> None:
    """Wait for all work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(device: torch.device, work: Callable[[], Any]) -> float:
    """Seconds of work to its end on the device."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def gate(peers: Collectives, kernels: str, folder: Path) -> Tensor:
    """Logits after a few steps on little data."""
    config = config_of("deepfm", GATE_BATCH, 4, peers.device.type, kernels, folder)
    worker = worker_of(pin(config, dataset_of(config, GATE_ROWS, 4, folder)), peers)
    tables, _ = batches_of(GATE_BATCH, GATE_STEPS, GATE_ROWS, 4)
    des_system(worker, tables).train(GATE_STEPS)
    return torch.logit(worker.score(tables[0]).double()).cpu()


@contextlib.contextmanager
def lone(device: torch.device) -> Iterator[Collectives]:
    """The collectives of one process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    peers = Collectives(device)
    try:
        yield peers
    finally:
        peers.close()


def check(peers: Collectives, folder: Path, expected: Tensor) -> None:
    """Compare the systems of DES with the CPU, and the kernels with themselves."""
    for kernels in ("torch", "triton"):
        first, second = (gate(peers, kernels, folder / f"{kernels}{run}") for run in range(2))
        apart = float(((first - expected).abs() / (1 + expected.abs())).max())
        emit("gate", kernels=kernels, logits_apart=apart, same_bits=bool(torch.equal(first, second)))
        if apart > 1e-4:
            raise SystemExit(f"{kernels}: logits differ by {apart}; a speed would say nothing")


def compare(peers: Collectives, model: str, batch: int, wanted: argparse.Namespace, folder: Path) -> None:
    """The systems in turns on one model and batch."""
    device, rows, fields = peers.device, wanted.rows, wanted.fields
    tables, numbers = batches_of(batch, wanted.different, rows, fields)
    systems = {"plain": plain_system(Plain(model, rows, fields, device), device, tables, numbers)}
    workers: dict[str, Worker] = {}
    first = model == wanted.models[0] and batch == wanted.batches[0]
    for name in ("torch", "triton", "graphs") if first else ("triton", "graphs"):
        place, kernels = folder / f"{model}{batch}{name}", "torch" if name == "torch" else "triton"
        config = config_of(model, batch, fields, device.type, kernels, place, graphs=name == "graphs")
        workers[name] = worker_of(pin(config, dataset_of(config, rows, fields, place)), peers)
        fill(workers[name], rows, fields)
        systems[name] = des_system(workers[name], tables)
    rates: dict[str, list[float]] = {name: [] for name in systems}
    for name, system in systems.items():
        emit(
            "warm",
            system=name,
            s=seconds(device, lambda system=system: system.train(WARM if device.type == "cuda" else 1)),
        )
    for _ in range(wanted.rounds):
        for name, system in systems.items():
            rates[name].append(wanted.steps * batch / seconds(device, lambda system=system: system.train(wanted.steps)))
    for name in systems:
        ratios = [own / plain for own, plain in zip(rates[name], rates["plain"], strict=True)]
        emit(
            "speed",
            model=model,
            batch=batch,
            system=name,
            samples_per_s=round(statistics.median(rates[name])),
            ratio=statistics.median(ratios),
            least=min(ratios),
            most=max(ratios),
        )
    replays = getattr(workers["graphs"], "replays", None)
    emit(
        "replays", model=model, batch=batch, steps=workers["graphs"].steps, replayed=replays.replayed if replays else 0
    )
    profiled(peers, workers["triton"], systems["triton"], model, batch)


def profiled(peers: Collectives, worker: Worker, system: System, model: str, batch: int) -> None:
    """Where a step's time goes: on the device by its events, elsewhere by the host's clock."""
    clock = CudaClock() if peers.device.type == "cuda" else None
    worker.profile = Profile(peers.device, lambda: peers.spent_s, clock)
    peers.inside = worker.profile.exchange
    system.train(WATCHED.stop if clock else 1)
    phases = {f"{name}_ms": round(ms, 3) for name, ms in worker.profile.ms_per_step().items()}
    emit("phases", model=model, batch=batch, **phases)
    told = worker.profile.on_device()
    if told is not None:
        moving_s = (phases["gather_ms"] + phases["update_ms"]) / 1000
        of_copy = told["least_bytes"] / moving_s / told["copy_bytes_per_s"]
        emit("profile", model=model, batch=batch, of_copy=of_copy, **told)


def kernels_alone(peers: Collectives, wanted: argparse.Namespace) -> None:
    """What the kernels of ids and rows reach: keys per second, and bytes against the copy bandwidth."""
    from des_core.config import OptimizerConfig, TableConfig
    from des_core.engine.device.batch import Places, control_of, segments_of
    from des_core.engine.device.pooling import Pooled
    from des_core.engine.device.table import DeviceTable

    device, fields, batch = peers.device, wanted.fields, wanted.batches[0]
    repeats = 10 if device.type == "cuda" else 1
    keys = wanted.rows * fields
    table = DeviceTable(FACTORS + 1, 2, 7, 0.01, TableConfig(), device, torch.float32)
    ids = ids_of(np.arange(keys), "t")
    pieces = [ids[at : at + (1 << 22)] for at in range(0, keys, 1 << 22)]
    took = [seconds(device, lambda p=p: look_up(table, p, 0, np.zeros(1))) for p in pieces]
    emit("insert", keys=keys, keys_per_s=round(keys / sum(took)), last_piece_per_s=round(len(pieces[-1]) / took[-1]))
    shuffled = torch.from_numpy(ids).to(device)[torch.randperm(keys, device=device)]
    mine = torch.ones(keys, dtype=torch.int8, device=device)
    table.keys.find(shuffled[: 1 << 10], mine[: 1 << 10])
    took = [seconds(device, lambda: table.keys.find(shuffled, mine)) for _ in range(repeats)]
    emit("find", keys=keys, keys_per_s=round(keys / statistics.median(took)))
    _, numbers = batches_of(batch, 1, wanted.rows, fields)
    slots_L = numbers[0].to(device).flatten().int()
    pooled = Pooled(table.rows, table.keys.ids, slots_L, Places(batch, fields), True, True)
    rule = OptimizerConfig(name="rowwise_adagrad", learning_rate=0.01)
    control = control_of(7, 1, rule, FACTORS + 1, 0.01).to(device)
    finite = torch.ones(1, dtype=torch.int32, device=device)
    segments = segments_of(slots_L)

    def whole() -> None:
        pooled.gradients = [part.detach() for part in pooled.with_gradients()]
        pooled.update(segments, rule.name, control, finite)

    whole()
    took_s = statistics.median(seconds(device, whole) for _ in range(repeats))
    least = float(pooled.least_bytes(segments))
    emit(
        "rows",
        lookups=len(slots_L),
        unique=len(slots_L.unique()),
        ms=1e3 * took_s,
        least_mb=least / 1e6,
        of_copy=least / took_s / copy_bandwidth(device),
    )
    emit("sort", ms=1e3 * statistics.median(seconds(device, lambda: segments_of(slots_L)) for _ in range(repeats)))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy on the device reads and writes."""
    size = 1 << (30 if device.type == "cuda" else 22)
    one = torch.empty(size, dtype=torch.uint8, device=device)
    other = torch.empty_like(one)
    other.copy_(one)
    return 2 * size / statistics.median(seconds(device, lambda: other.copy_(one)) for _ in range(5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["deepfm", "fm", "lr", "dcn_v2", "dlrm"])
    parser.add_argument("--batches", nargs="+", type=int, default=[65536, 8192])
    parser.add_argument("--rows", type=int, default=1_000_000, help="of each field")
    parser.add_argument("--fields", type=int, default=26)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="of each turn")
    parser.add_argument("--different", type=int, default=8, help="batches that take turns")
    parser.add_argument("--reference", help=argparse.SUPPRESS)
    wanted, began = parser.parse_args(), time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if wanted.reference:
            with lone(torch.device("cpu")) as peers:
                torch.save(gate(peers, "torch", folder), wanted.reference)
            return
        expected = folder / "expected.pt"
        subprocess.run([sys.executable, __file__, "--reference", str(expected)], check=True)
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
        emit("card", name=card, torch=torch.__version__, copy_gb_per_s=copy_bandwidth(device) / 1e9)
        with lone(device) as peers:
            check(peers, folder, torch.load(expected))
            kernels_alone(peers, wanted)
            for model in wanted.models:
                for batch in wanted.batches if model == "deepfm" else wanted.batches[:1]:
                    compare(peers, model, batch, wanted, folder)
                    gc.collect()
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
        emit("done", s=round(time.perf_counter() - began))


if __name__ == "__main__":
    main()

"""How fast does a replica answer: the model alone, over HTTP, from the disk, in little memory, while its alias moves?

    python benchmarks/serve.py --values 100000 --seconds 10
    python benchmarks/serve.py --values 200000 --models criteo     5.2M rows, 0.4 GB

Models of hand-made weights, ``--values`` rows for each categorical field, Zipf values of which some have no row:

    demo      deepfm, 8 categorical fields, k = 8, hidden 32-16
    criteo    deepfm, 13 numeric and 26 categorical fields, k = 16, hidden 256-128

    model     Scorer.score on a table of raw records: encode, de-duplicate, find rows, forward; CPU time of one thread
    batches   1,000 records a request (dataframe_split), 2 connections kept open
    single    one record a request (dataframe_records), by connections kept open; each asks again once answered
    lookups   ids drawn alike, by CPU time of one thread
    disk      single records with values drawn alike, of the model alone: warm; and when before each of them the
              files of weights were dropped from the system's memory, so that every page is read from the disk
    memory    the same records over HTTP, by a replica with ``--memory`` of a quarter of the model: the most of the
              files that it had in memory, and what it had beside them
    swaps     single records by 4 connections while the alias moves, polled every 0.2 s: failed requests. Version 2 is
              version 1 and a delta: a hundredth of the rows changed, a thousandth gone

HTTP is ``des serve`` in a process of its own, asked over loopback by this one, which shares its cores. By CPU time:
requests for each second that the replica's process kept a core, whatever else the machine did meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import logging
import mmap
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

ROOT = Path(__file__).resolve().parent.parent
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
for variable in THREADS:
    os.environ.setdefault(variable, "1")

sys.path.insert(0, str(ROOT))

import mlflow  # noqa: E402

from benchmarks import handmade  # noqa: E402
from des_core import storage  # noqa: E402
from des_core.config import Config, parse_config  # noqa: E402
from des_core.contracts import Reference  # noqa: E402
from des_core.data.feed.batches import NUMBER, ids_of  # noqa: E402
from des_core.data.read.hashing import hash_values  # noqa: E402
from des_core.data.store.encoding import fields_of, specs_of  # noqa: E402
from des_core.engine.models import build  # noqa: E402
from des_core.log import parse_event  # noqa: E402
from des_core.release.serve import serving  # noqa: E402
from des_core.release.serve.weight_files import advise  # noqa: E402

BATCH = 1000
LOOKUPS = 50_000
ZIPF = 1.2
DEMO = ("user", "item", "category", "advertiser", "site", "slot", "device", "region")
CONFIGS: dict[str, dict[str, Any]] = {
    "demo": {
        "run": {"name": "demo"},
        "source": {"path": "none.csv"},
        "fields": [{"name": name} for name in DEMO],
        "model": {"name": "deepfm", "factors": 8, "hidden": [32, 16]},
    },
    "criteo": {
        "run": {"name": "criteo"},
        "source": {"format": "criteo", "path": "none.tsv"},
        "model": {"name": "deepfm", "factors": 16, "hidden": [256, 128]},
    },
}

Columns = dict[str, list[Any]]


class Answer(NamedTuple):
    """How a request fared."""

    seconds: float
    status: str
    version: str


def values_of(count: int) -> list[str]:
    """Texts of 8 hexadecimal digits."""
    return [f"{value * 2654435761 % 2**32:08x}" for value in range(count)]


def checkpoints(root: Path, config: Config, values: int) -> tuple[Reference, Reference]:
    """A checkpoint under ``root`` with random weights for every value, and one that adds a delta to it."""
    random = np.random.default_rng(1)
    fields = specs_of(fields_of(config))
    keys = hash_values(pa.array(values_of(values)))
    numbers = np.array([NUMBER])
    ids = {field.table: ids_of(numbers if field.kind == "numeric" else keys, field.table) for field in fields}
    model = build(config.model, [field.name for field in fields], 0, 1)

    def rows_of(ids: dict[str, Any]) -> dict[str, Any]:
        shapes = {table: (len(found), model.row_width) for table, found in ids.items()}
        return {table: random.normal(0, 0.05, shape).astype(np.float32) for table, shape in shapes.items()}

    whole = handmade.checkpoint(str(root), config.run.name, 1, fields, ids, rows_of(ids), model, state_width=2)
    changed = {table: random.permutation(found)[: -(-len(found) // 100)] for table, found in ids.items()}
    gone = {table: np.sort(found.view(np.uint64))[::1000].view(np.int64) for table, found in ids.items()}
    words = (str(root), config.run.name, 2, fields, changed, rows_of(changed), model, whole, gone, 2)
    return whole, handmade.checkpoint(*words)


def records_of(config: Config, values: int, rows: int, seed: int, alike: bool = False) -> Columns:
    """Raw records; one number in ten is missing. Values have Zipf's frequencies, or all the same."""
    random = np.random.default_rng(seed)
    texts = values_of(values + values // 20)
    columns: Columns = {}
    for field in specs_of(fields_of(config)):
        if field.kind == "numeric":
            numbers = random.integers(0, 1000, rows).tolist()
            columns[field.column] = [None if random.random() < 0.1 else number for number in numbers]
        else:
            ranks = random.integers(0, values, rows) if alike else np.minimum(random.zipf(ZIPF, rows), len(texts)) - 1
            columns[field.column] = [texts[rank] for rank in ranks]
    return columns


def alone(folder: Path, columns: Columns, seconds: float) -> Iterator[tuple[str, str]]:
    """Records a second and core by batch."""
    scorer = serving.Scorer(str(folder))
    whole = pa.table(columns)
    for size in (1, BATCH, 8192):
        tables = [whole.slice(at, size) for at in range(0, min(whole.num_rows - size + 1, 64 * size), size)]
        for table in tables[:3]:
            scorer.score(table)
        times: list[float] = []
        until = time.monotonic() + seconds / 3
        while time.monotonic() < until or len(times) < 3:
            started = time.thread_time()
            scorer.score(tables[len(times) % len(tables)])
            times.append(time.thread_time() - started)
        middle = float(np.median(times))
        yield f"model alone, {size:,} a batch", f"{size / middle:,.0f} records/s per core ({middle * 1e3:.2f} ms)"


def lookups(folders: list[Path], config: Config, values: int) -> tuple[str, str]:
    """CPU time of a lookup with its row, in one layer and in two."""
    random = np.random.default_rng(3)
    keys, fields = hash_values(pa.array(values_of(values))), specs_of(fields_of(config))
    tables = sorted({field.table for field in fields})
    names = [field.table for field in fields if field.kind != "numeric"]
    middles = []
    for rows in (serving.Scorer(str(folder)).rows for folder in folders):
        times = []
        for _ in range(20):
            asked = random.integers(0, len(names), LOOKUPS)
            ids = np.concatenate([ids_of(random.choice(keys, np.sum(asked == n)), names[n]) for n in range(len(names))])
            of = np.repeat([tables.index(name) for name in names], np.bincount(asked, minlength=len(names)))
            order = random.permutation(LOOKUPS)
            started = time.thread_time()
            rows.rows(rows.find(ids[order], of[order]))
            times.append((time.thread_time() - started) / LOOKUPS)
        middles.append(float(np.median(times)) * 1e9)
    return "a lookup with its row, in one layer and in two", ", ".join(f"{middle:.0f} ns" for middle in middles)


def one_by_one(folder: Path, root: Path, columns: Columns) -> Iterator[tuple[str, str]]:
    """Single records with the files of weights in the system's memory, and without."""
    scorer = serving.Scorer(str(folder))
    whole = pa.table(columns)
    tables = [whole.slice(at, 1) for at in range(min(whole.num_rows, 300))]
    for table in tables[:20]:
        scorer.score(table)
    for how, cold in (("in the system's memory", False), ("on the disk", True)):
        times, spent, pages = [], [], []
        for table in tables[20:]:
            if cold:
                for file in scorer.rows.files:
                    advise(file, mmap.MADV_DONTNEED, 0, file.size)
                for path in root.rglob("*.arrow"):
                    forget(path)
            used, read = time.thread_time(), resource.getrusage(resource.RUSAGE_SELF).ru_majflt
            started = time.perf_counter()
            scorer.score(table)
            times.append(time.perf_counter() - started)
            spent.append(time.thread_time() - used)
            pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_majflt - read)
        p50, p99 = np.percentile(times, [50, 99]) * 1e3
        middle = f"{np.median(spent) * 1e3:.1f} ms by CPU time, {np.median(pages):.0f} pages from the disk"
        yield f"model alone, single, weights {how}", f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, {middle}"


def forget(path: Path) -> None:
    """Drop a file from the system's memory."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def replica(uri: str, name: str, *words: str) -> Iterator[tuple[int, int]]:
    """Port and process id of ``des serve`` once it is ready."""
    command = [sys.executable, "-c", "from pipelines.cli import main; main()", "serve", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--model", f"models:/{name}@champion", "--poll-s", "0.2", *words],
        env=os.environ | {"MLFLOW_TRACKING_URI": uri, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        events: dict[str, dict[str, str]] = {}
        while "serving" not in events or "listening" not in events:
            line = process.stderr.readline()
            if not line:
                raise SystemExit("des serve ended")
            event = parse_event(line)
            events[event.get("event", "")] = event
        yield int(events["listening"]["port"]), process.pid
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 0, process.returncode


def request_of(document: Any) -> bytes:
    """A whole request."""
    body = json.dumps(document).encode()
    lines = ("POST /invocations HTTP/1.1", "Host: a", "Content-Type: application/json", f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


async def ask(port: int, requests: list[bytes], first: int, until: Callable[[], bool], answers: list[Answer]) -> None:
    """Ask again and again on one connection, each time once answered."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for number in itertools.takewhile(lambda _: not until(), itertools.count(first)):
        started = time.perf_counter()
        writer.write(requests[number % len(requests)])
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        headers = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
        await reader.readexactly(int(headers["content-length"]))
        took = time.perf_counter() - started
        answers.append(Answer(took, head.split()[1], headers.get("x-des-model-version", "")))
    writer.close()


async def load(port: int, requests: list[bytes], connections: int, seconds: float) -> list[Answer]:
    """All answers of some connections at once."""
    end = time.monotonic() + seconds
    answers: list[Answer] = []
    asked = [ask(port, requests, 7 * n, lambda: time.monotonic() > end, answers) for n in range(connections)]
    await asyncio.gather(*asked)
    return answers


def cpu_seconds(process: int) -> float:
    """User and system time of a process so far, as Linux tells it."""
    words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def over_http(port: int, process: int, columns: Columns, seconds: float) -> Iterator[tuple[str, str]]:
    """Batches and single records."""
    rows = list(zip(*columns.values(), strict=True))
    batches = [
        request_of({"dataframe_split": {"columns": list(columns), "data": rows[at : at + BATCH]}})
        for at in range(0, min(len(rows), 8 * BATCH), BATCH)
    ]
    asyncio.run(load(port, batches, 2, 1))
    used = cpu_seconds(process)
    answers = asyncio.run(load(port, batches, 2, seconds))
    used = (cpu_seconds(process) - used) / len(answers)
    rate = f"{BATCH * len(answers) / seconds:,.0f} records/s, {BATCH / used:,.0f} by CPU time"
    yield f"HTTP, {BATCH:,} a request, 2 connections", f"{rate}, {of_times(answers)}"
    single = [request_of({"dataframe_records": [dict(zip(columns, row, strict=True))]}) for row in rows[:500]]
    for connections in (1, 8):
        used = cpu_seconds(process)
        answers = asyncio.run(load(port, single, connections, seconds))
        used = (cpu_seconds(process) - used) / len(answers)
        rate = f"{len(answers) / seconds:,.0f} requests/s, {1 / used:,.0f} by CPU time"
        yield f"HTTP, single, {connections} connections", f"{rate}, {of_times(answers)}"


def held_mb(process: int) -> tuple[float, float]:
    """What a process has in memory of files of weights, and of its own, MB."""
    weights, of_weights = 0, False
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        if "-" in line.partition(" ")[0]:
            of_weights = line.endswith(".arrow")
        elif line.startswith("Rss:") and of_weights:
            weights += int(line.split()[1])
    (own,) = re.findall(r"RssAnon:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
    return weights * 1.024e-3, int(own) * 1.024e-3


async def watched(port: int, process: int, requests: list[bytes], seconds: float) -> tuple[list[Answer], float, float]:
    """Answers on one connection, and the most that the process held meanwhile, MB."""
    asked = asyncio.create_task(load(port, requests, 1, seconds))
    most = []
    while not asked.done():
        await asyncio.sleep(seconds / 20)
        most.append(await asyncio.to_thread(held_mb, process))
    weights, own = np.max(most, 0)
    return await asked, float(weights), float(own)


def in_memory(port: int, process: int, columns: Columns, bound: str, seconds: float) -> tuple[str, str]:
    """Single records, and what the replica held meanwhile."""
    rows = zip(*columns.values(), strict=True)
    requests = [request_of({"dataframe_records": [dict(zip(columns, row, strict=True))]}) for row in rows]
    answers, weights, own = asyncio.run(watched(port, process, requests, seconds))
    held = f"held {weights:,.0f} MB of weights' files and {own:,.0f} MB beside"
    return f"HTTP, single, values alike, {bound}", f"{of_times(answers)}; {held}"


def of_times(answers: list[Answer]) -> str:
    """Percentiles of those that were answered, and how many were not."""
    p50, p99 = np.percentile([answer.seconds for answer in answers], [50, 99]) * 1e3
    failed = sum(answer.status != "200" for answer in answers)
    return f"p50 {p50:.1f} ms, p99 {p99:.1f} ms" + (f", {failed} FAILED" if failed else "")


async def swapped(port: int, requests: list[bytes], client: mlflow.MlflowClient, name: str) -> tuple[str, str]:
    """Requests and failed ones while the alias goes to and fro, each time until the other version answers."""
    answers: list[Answer] = []
    stop = asyncio.Event()
    asking = asyncio.gather(*(ask(port, requests, 0, stop.is_set, answers) for _ in range(4)))
    waits = []
    for version in ("2", "1", "2"):
        started = time.monotonic()
        await asyncio.to_thread(client.set_registered_model_alias, name, "champion", version)
        while (not answers or answers[-1].version != version) and time.monotonic() < started + 60:
            await asyncio.sleep(0.05)
        waits.append(time.monotonic() - started)
    stop.set()
    await asking
    failed = sum(answer.status != "200" for answer in answers)
    what = f"{failed} of {len(answers):,} requests failed, the new version answered after {max(waits):.1f} s at most"
    return f"alias moved {len(waits)} times", f"{what}, {of_times(answers)}"


def registered(root: Path, uri: str, config: Config, values: int) -> mlflow.MlflowClient:
    """A registry with two versions, the first one champion."""
    for chatty in ("mlflow", "alembic"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient(uri, uri)
    client.create_registered_model(config.run.name)
    fields = specs_of(fields_of(config))
    for number, checkpoint in enumerate(checkpoints(root, config, values), 1):
        folder = root / config.run.name / str(number)
        handmade.describe(str(folder / "model"), "0" * 64, config, fields, checkpoint)
        mlflow.pyfunc.save_model(
            folder / "logged",
            loader_module="des_core.release.serve.pyfunc",
            data_path=str(folder / "model"),
            pip_requirements=["mlflow"],
        )
        digest = storage.digest_file(str(folder / "model" / "des.json"))
        client.create_model_version(config.run.name, str(folder / "logged"), tags={"des.model_digest": digest})
    client.set_registered_model_alias(config.run.name, "champion", "1")
    return client


def measure(root: Path, uri: str, name: str, values: int, seconds: float) -> Iterator[tuple[str, str]]:
    """All questions for one model."""
    config = parse_config(CONFIGS[name])
    client = registered(root, uri, config, values)
    columns = records_of(config, values, 16_384, 1)
    model = root / name / "1" / "model"
    yield from alone(model, columns, seconds)
    alike = records_of(config, values, 4096, 2, alike=True)
    yield lookups([model, root / name / "2" / "model"], config, values)
    yield from one_by_one(model, root / "checkpoints" / name, alike)
    with replica(uri, name) as (port, process):
        yield in_memory(port, process, alike, "no bound", seconds)
        yield from over_http(port, process, columns, seconds)
        record = request_of({"inputs": {field: values[:1] for field, values in columns.items()}})
        yield asyncio.run(swapped(port, [record], client, name))
    megabytes = serving.Scorer(str(model)).rows.size / 1e6
    bound = max(1, round(megabytes / 4))
    with replica(uri, name, "--memory", str(bound)) as (port, process):
        yield in_memory(port, process, alike, f"--memory {bound} of {megabytes:,.0f} MB", seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=int, default=100_000, help="rows of each categorical field")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--models", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    options = parser.parse_args()
    print(f"{len(os.sched_getaffinity(0))} CPUs, load {os.getloadavg()[0]:.1f}, {options.values:,} rows a field")
    print("\n| model | question | answer |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.models:
            root = Path(scratch)
            for question, answer in measure(root, f"sqlite:///{root}/mlflow.db", name, options.values, options.seconds):
                print(f"| {name} | {question} | {answer} |", flush=True)


if __name__ == "__main__":
    main()

"""Does any process hold more than its share? A model and a day that are larger than what each process may take.

    python benchmarks/larger.py [--rows 40000000] [--day-rows 50000000] [--cap-mb 1500] [--work FOLDER]

Logs of four fields of ids are made; every command below is ``des``, and every process it starts is watched: the peak of
its resident memory without mapped files (RssAnon, 20 times a second) and the bytes it read and wrote are noted, and one
above the cap is killed, which fails the benchmark.

    model    ingest, train with 4 workers and checkpoints in the background, killed in the middle, resumed with 3,
             evaluate, gate, register; a second model against this champion; a replica that serves it
    day      a day of --day-rows rows: ingest, score by the champion, train on it, judge, register

Prints key=value lines, one for each command and role, and the bytes of all weights for comparison.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from des_core import log

FIELDS = ("user", "item", "page", "query")
CHUNK = 1 << 18
LOOK_S = 0.05
ROOT = Path(__file__).parent.parent

TOML = """
[run]
name = "larger"
dir = "{work}/run"

[source]
format = "parquet"
path = "{work}/logs/{{day}}.parquet"
label = "click"
time = "time"
time_format = "unix"

{fields}

[split]
by = "day"

[model]
name = "fm"
factors = 16

[train]
workers = 4
batch = 16384
epochs = 1
shuffle = false
early_stop = "none"
exchange = "sum"

[optimizer.rows]
name = "rowwise_adagrad"
learning_rate = 0.05

[gate]
min_auc = 0.4
max_auc_drop = 0.5
max_ne = 1.2
"""


@dataclass
class Peak:
    """What the processes of one role took at most."""

    processes: int = 0
    anonymous_mb: float = 0.0
    """Of one process."""
    read_mb: float = 0.0
    """Of all of them, from files or the system's cache, as they asked for it."""
    written_mb: float = 0.0


@dataclass
class Watch:
    """The descendants of a process, by role."""

    cap_mb: float
    peaks: dict[str, Peak] = field(default_factory=dict)
    over: str = ""
    """The role of a process that was killed for taking more than the cap."""


def write_day(path: Path, rows: int, first_id: int, new_ids: int, start_s: int, seed: int) -> None:
    """A log whose ids are ``new_ids`` new ones of each field, each at least once, and then those known so far."""
    draw = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    names = {"click": pa.int8(), "time": pa.int64()} | dict.fromkeys(FIELDS, pa.int64())
    with pq.ParquetWriter(path, pa.schema(list(names.items())), compression="snappy", use_dictionary=False) as file:
        for begin in range(0, rows, CHUNK):
            size = min(CHUNK, rows - begin)
            place = np.arange(begin, begin + size)
            known = first_id + (new_ids * draw.random(size) ** 3).astype(np.int64)
            # Each field meets the new ids in an order of its own.
            ids = {
                name: np.where(place < new_ids, first_id + (place + number * new_ids // 4) % max(new_ids, 1), known)
                for number, name in enumerate(FIELDS)
            }
            clicked = draw.random(size) < 0.2 + 0.2 * (ids["user"] % 3 == 0)
            columns = [clicked.astype(np.int8), start_s + place * 86_000 // rows, *ids.values()]
            file.write_table(pa.table([pa.array(column) for column in columns], names=list(names)))


def status_of(pid: int) -> tuple[str, float, float, float]:
    """Role, anonymous resident memory, and bytes read and written of a process, in MB."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    moved = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    role = next((word.decode().rpartition(".")[2] for word in words if word.startswith(b"des_core.engine")), "")
    anonymous = float(status.get("RssAnon", "0 kB").split()[0]) / 1024
    return role, anonymous, int(moved["rchar"]) / 1e6, int(moved["wchar"]) / 1e6


def descendants(pid: int) -> Iterator[int]:
    """Processes that a process has started, and theirs."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield int(child)
            yield from descendants(int(child))


@contextmanager
def watched(process: subprocess.Popen[str], command: str, watch: Watch) -> Iterator[None]:
    """Note what a command and its descendants take, while the block runs."""
    ended = threading.Event()
    seen: dict[int, tuple[str, float, float, float]] = {}

    def look() -> None:
        while not ended.wait(LOOK_S):
            with suppress(OSError, ValueError):
                for pid in (process.pid, *descendants(process.pid)):
                    role, anonymous, read, written = status_of(pid)
                    kind = f"{command}: {role}" if role else command
                    seen[pid] = (kind, max(anonymous, seen.get(pid, ("", 0.0))[1]), read, written)
                    if anonymous > watch.cap_mb:
                        watch.over = f"{kind} took {anonymous:.0f} MB"
                        os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        for kind, anonymous, read, written in seen.values():
            peak = watch.peaks.setdefault(kind, Peak())
            peak.processes += 1
            peak.anonymous_mb = max(peak.anonymous_mb, anonymous)
            peak.read_mb += read
            peak.written_mb += written


def des(watch: Watch, words: list[str], kill_after: str = "") -> str:
    """Standard output and error of a command, which must end well; or its output until it says ``kill_after``."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    command = words[0]
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=ROOT,
        start_new_session=True,
    )
    lines = []
    assert process.stdout is not None
    with watched(process, command, watch):
        for line in process.stdout:
            lines.append(line)
            if kill_after and line.startswith(kill_after):
                os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    told = log.format_event("command", words=" ".join(words[:3]), seconds=round(time.perf_counter() - start, 1))
    print(told, flush=True)
    if watch.over or (code and not kill_after):
        sys.exit(f"{watch.over or command} failed:\n{''.join(lines[-15:])}")
    return "".join(lines)


def serve(watch: Watch, config: list[str], port: int) -> None:
    """A replica that scores a thousand records."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = ["serve", "--model", "models:/larger@champion", "--port", str(port), *config]
    process = subprocess.Popen([sys.executable, "-m", "pipelines.cli", *words], env=environment, cwd=ROOT)
    try:
        with watched(process, "serve", watch):
            records = ",".join(
                "{" + ",".join(f'"{name}": {number * 37}' for name in FIELDS) + ', "time": 1767225600}'
                for number in range(1000)
            )
            body = f'{{"dataframe_records": [{records}]}}'.encode()
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"}
            )
            for attempt in range(600):
                try:
                    urllib.request.urlopen(request, timeout=60).close()
                    break
                except OSError:
                    if process.poll() is not None or attempt == 599:
                        sys.exit("serve does not answer")
                    time.sleep(0.2)
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    """Make the logs, run everything, print what each process took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=40_000_000, help="Rows of the model's tables.")
    parser.add_argument("--day-rows", type=int, default=50_000_000, help="Rows of the day's log.")
    parser.add_argument("--cap-mb", type=float, default=1500.0)
    parser.add_argument("--port", type=int, default=18_980)
    parser.add_argument("--work", default="")
    wanted = parser.parse_args()
    work = Path(wanted.work or tempfile.mkdtemp(prefix="larger-"))
    work.mkdir(parents=True, exist_ok=True)
    ids = wanted.rows // len(FIELDS)
    write_day(work / "logs" / "2026-01-01.parquet", ids, 0, ids, 1_767_225_600, 0)
    write_day(work / "logs" / "2026-01-02.parquet", ids // 20, 0, ids, 1_767_312_000, 1)
    write_day(work / "logs" / "2026-01-03.parquet", ids // 20, 0, ids, 1_767_398_400, 2)
    (work / "run.toml").write_text(
        TOML.format(work=work, fields="\n".join(f"[[fields]]\nname = {name!r}" for name in FIELDS))
    )
    config = ["-c", str(work / "run.toml")]
    watch = Watch(wanted.cap_mb)
    des(watch, ["ingest", *config])
    every = max(ids // 16384 // 4, 1)
    resumable = [*config, "--set", f"train.checkpoint_steps={every}"]
    des(watch, ["train", *resumable], kill_after="event=checkpoint")
    des(watch, ["train", *resumable, "--set", "train.workers=3", "--resume"])
    for command in ("evaluate", "register"):
        des(watch, [command, *resumable, "--set", "train.workers=3"])
    second = [*config, "--set", "run.seed=1"]
    for command in ("ingest", "train", "evaluate", "register"):
        des(watch, [command, *second])
    serve(watch, config, wanted.port)
    write_day(work / "logs" / "2026-01-04.parquet", wanted.day_rows, 0, ids, 1_767_484_800, 3)
    des(watch, ["run", *config, "--set", "run.name=larger-day", "--as-of", "2026-01-03"])
    des(watch, ["run", *config, "--set", "run.name=larger-day", "--as-of", "2026-01-04"])
    for kind, peak in watch.peaks.items():
        log.emit(
            "peak",
            to=sys.stdout,
            what=kind,
            processes=peak.processes,
            anonymous_mb=round(peak.anonymous_mb),
            read_mb=round(peak.read_mb),
            written_mb=round(peak.written_mb),
        )
    weights = sum(path.stat().st_size for path in (work / "run" / "checkpoints").rglob("weights-*.arrow"))
    log.emit("weights", to=sys.stdout, rows=wanted.rows, mb_in_all_checkpoints=round(weights / 1e6))


if __name__ == "__main__":
    main()

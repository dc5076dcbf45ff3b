"""A worker that behaves as told by DES_TEST_WORKER, in place of the engine's."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

from des_core import log

RANK = int(os.environ["RANK"])


def done() -> None:
    if RANK == 0:
        log.emit("step", step=7, of=10, epoch=1, loss=0.5, samples_per_s=100, eta_s=1, to=sys.stdout)
        print("a word of no meaning")
        seen = {"arguments": sys.argv[1:], "environment": dict(os.environ), "path": sys.path}
        Path(os.environ["DES_TEST_FOLDER"], "seen.json").write_text(json.dumps(seen))


def mistaken() -> None:
    if RANK == 1:
        leave("checkpoint", "checkpoint was written for factors=16; set model.factors = 16")
        sys.exit(2)
    time.sleep(60)


def killed() -> None:
    if RANK == 0:
        log.emit("step", step=7, of=10, to=sys.stdout)
        time.sleep(60)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


def frozen() -> None:
    from des_core.engine import process
    from des_core.engine.exchange import collectives

    collectives.BEAT_S, collectives.SILENCE_S = 0.1, 1.0
    with collectives.heartbeat(partial(process._lost, RANK)):
        if RANK == 1:
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(60)


def stuck_at_the_end() -> None:
    log.emit("leaving", worker=RANK, to=sys.stdout)
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGSTOP)


def crashed() -> None:
    if RANK == 1:
        raise RuntimeError("nobody foresaw this")
    time.sleep(60)


def staying() -> None:
    Path(os.environ["DES_TEST_FOLDER"], f"pid-{RANK}").write_text(str(os.getpid()))
    time.sleep(60)


def leave(code: str, message: str) -> None:
    path = Path(os.environ["DES_ERROR_FILE"])
    partial = path.with_suffix(f".{RANK}")
    partial.write_text(json.dumps({"code": code, "message": message, "worker": RANK}))
    partial.replace(path)


if __name__ == "__main__":
    Path(os.environ["DES_TEST_FOLDER"], f"pid-{RANK}").write_text(str(os.getpid()))
    globals()[os.environ["DES_TEST_WORKER"]]()

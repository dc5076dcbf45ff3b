"""The process of a worker under torchrun: its arguments and device, what it reports when it fails, and how it ends."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial

import torch

from des_core import log, storage
from des_core.config import Config, parse_config
from des_core.contracts import Reference
from des_core.engine.exchange.collectives import Collectives, heartbeat
from des_core.errors import ConfigError, DesError, OutOfMemoryError, PeerLostError, WorkerError, of_system
from des_core.run import Day, Run, pin
from des_core.secrets import hidden


def device_of(config: Config) -> torch.device:
    """The device of this process.

    Raises:
        ConfigError: cuda is asked for, and there is none or too few.
    """
    wanted = config.train.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device = 'cuda', but torch sees no GPU here; set it to 'auto' or 'cpu'")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    # NCCL refuses two workers on one GPU.
    gpus, workers = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if workers > gpus:
        told = f"{workers} workers need a GPU each, and there are {gpus} here"
        if wanted == "cuda":
            raise ConfigError(
                f"train.device = 'cuda' with {told}; set train.workers to {gpus}, or train.device to 'cpu'"
            )
        if os.environ.get("RANK", "0") == "0":
            log.emit("device", use="cpu", why=told)
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def main(role: Callable[[Run, Collectives, bool], None]) -> None:
    """Entry of a worker process under torchrun: do a role, or leave one line saying why not."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True, help="inputs.json of the run")
    parser.add_argument("--dataset", required=True, help="reference of the data manifest")
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    rank = int(os.environ["RANK"])
    try:
        inputs = storage.read_json(arguments.config)
        config = parse_config(json.dumps(inputs["config"]), arguments.config)
        day = inputs.get("day")
        run = pin(config, Reference.parse(arguments.dataset), Day.model_validate(day) if day else None)
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        with heartbeat(partial(_lost, rank)), _reported(rank):
            peers = Collectives(device_of(config))
            _join(peers)
            role(run, peers, arguments.resume)
            peers.close()
        # The launcher waits no longer than a while from here on.
        log.emit("leaving", worker=rank, to=sys.stdout)
    except Exception as error:
        sys.exit(_failed(error, rank))


@contextlib.contextmanager
def _reported(rank: int) -> Iterator[None]:
    """A failure inside is reported before anything else is waited for, and this process leaves without more ado.

    Its peers may be gone, and then neither the heartbeat's thread nor torch's own would end in time.
    """
    try:
        yield
    except Exception as error:
        code = _failed(error, rank)
        sys.stdout.flush()
        os._exit(code)


def _failed(error: Exception, rank: int) -> int:
    """Report an error, an unexpected one with its traceback, and return the exit code."""
    known = of_system(error) if isinstance(error, OSError) else error
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        reason = " ".join(str(error).split())[:200] or "the system refused it"
        known = OutOfMemoryError(f"worker {rank} has no memory left ({reason}); give it more, or use more workers")
    elif not isinstance(known, DesError):
        # In one piece, because other workers write to the same log.
        os.write(sys.stderr.fileno(), hidden("".join(traceback.format_exception(error))).encode())
        known = WorkerError(f"worker {rank} crashed ({type(error).__name__}: {str(error)[:200]})")
    _report(known, rank)
    return known.exit_code


def _join(peers: Collectives) -> None:
    """Say, once in each pod, which workers it has and where worker 0 is."""
    if "POD_NAME" in os.environ and os.environ.get("LOCAL_RANK") == "0":
        pod, first = os.environ["POD_NAME"], os.environ["MASTER_ADDR"]
        log.emit("joined", pod=pod, worker=peers.rank, workers=peers.workers, worker_0_at=first, to=sys.stdout)


def _lost(rank: int, peer: int, silent_s: float) -> None:
    """Say whose heart stopped, a peer's or the store's (-1), and leave at once: this process waits in a collective."""
    who = f"worker {peer}" if peer >= 0 else "the rendezvous store, beside worker 0,"
    _report(PeerLostError(f"{who} has not answered for {silent_s:.0f} s (killed, frozen or cut off)"), rank)
    os._exit(1)


def _report(error: DesError, rank: int) -> None:
    """Leave the failure for the launcher; the first worker to fail knows the cause best."""
    message = " ".join(str(error).split())
    print(f"worker {rank}: {message}", file=sys.stderr, flush=True)
    path = os.environ.get("DES_ERROR_FILE")
    if not path:
        # From a pod the launcher has nothing but the log.
        log.emit("error", code=error.code, worker=rank, message=message)
    else:
        partial_path = f"{path}.{rank}"
        with open(partial_path, "w", encoding="utf-8") as file:
            json.dump({"code": error.code, "message": message, "worker": rank}, file)
        with contextlib.suppress(FileExistsError):
            os.link(partial_path, path)
        os.remove(partial_path)

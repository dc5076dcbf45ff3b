"""Heartbeats over a real rendezvous store: a silent peer and a silent store are told of in time, and hold nobody up."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from des_core.engine.exchange import collectives

STORE = """
import sys, time
from datetime import timedelta
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, wait_for_workers=False)
for rank in sys.argv[2:]:
    store.add(f"des/beat/{rank}", 1)
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """A store in a process of its own, where worker 1 has beaten once; this process is worker 0 of 2."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with subprocess.Popen([sys.executable, "-c", STORE, str(port), "1"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        for name, value in (("RANK", 0), ("WORLD_SIZE", 2), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(collectives, "BEAT_S", 0.05)
        monkeypatch.setattr(collectives, "JOIN_S", 0.5)
        yield process
        process.kill()


class Told:
    """Who was lost, and when."""

    def __init__(self) -> None:
        self.who: list[int] = []
        self.event = threading.Event()

    def __call__(self, worker: int, silent_s: float) -> None:
        self.who.append(worker)
        self.event.set()


def test_a_worker_that_stops_beating_is_named(store: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "SILENCE_S", 0.5)
    told = Told()
    with collectives.heartbeat(told):
        assert told.event.wait(20)
    assert told.who == [1]


def test_a_worker_that_was_never_born_has_longer(store: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "SILENCE_S", 0.3)
    monkeypatch.setenv("RANK", "1")
    told = Told()
    with collectives.heartbeat(told):
        assert not told.event.wait(1.0)


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_store_that_freezes_or_dies_is_told_of_and_holds_nobody_up(
    store: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """The store's own time limit does not hold where its process is frozen."""
    monkeypatch.setattr(collectives, "SILENCE_S", 1.0)
    told = Told()
    with collectives.heartbeat(told):
        time.sleep(0.2)
        store.send_signal(number)
        started = time.monotonic()
        assert told.event.wait(20)
        assert told.who == [-1] and time.monotonic() - started < 10
        leaving = time.monotonic()
    assert time.monotonic() - leaving < 10
    if number == signal.SIGSTOP:
        store.send_signal(signal.SIGCONT)


def test_an_error_inside_comes_out_though_the_store_is_frozen(
    store: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collectives, "SILENCE_S", 30.0)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="of the work's own"), collectives.heartbeat(Told()):
        store.send_signal(signal.SIGSTOP)
        time.sleep(0.2)
        raise RuntimeError("of the work's own")
    assert time.monotonic() - started < 10
    store.send_signal(signal.SIGCONT)


@pytest.mark.gpu
def test_a_barrier_of_two_gpus_blocks_the_host(tmp_path: object) -> None:
    """A collective is only enqueued when it returns: without waiting, worker 0 would look too early."""
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices: NCCL refuses two ranks on one")
    program = f"""
import os, time, torch
from des_core.engine.exchange.collectives import Collectives
rank = int(os.environ["RANK"])
torch.cuda.set_device(rank)
peers = Collectives(torch.device("cuda", rank))
peers.barrier()
if rank == 1:
    time.sleep(1.0)
    open({str(tmp_path)!r} + "/file", "w").close()
peers.barrier()
assert os.path.exists({str(tmp_path)!r} + "/file"), "worker 0 looked before worker 1 had written"
peers.close()
"""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    done = subprocess.run([*command, sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

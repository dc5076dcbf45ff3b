"""Work that is replayed is the work that ran plainly; a stand-in for CUDA graphs calls the captured function again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from des_core.engine.device.graphs import MOST, WARM, Replays
from des_core.run import pin

Answer = tuple[Tensor, ...]


class Again:
    """Does captured work anew, into the tensors of the first time: as a graph, it knows addresses alone."""

    def __init__(self) -> None:
        self.captures = 0

    def capture(self, work: Callable[[], Answer]) -> Callable[[], Answer]:
        self.captures += 1
        outputs: list[Tensor] = []

        def replay() -> Answer:
            found = work()
            if not outputs:
                outputs.extend(part.clone() for part in found)
            for held, part in zip(outputs, found, strict=True):
                held.copy_(part)
            return tuple(outputs)

        return replay


def doubled(inputs: tuple[Tensor | None, ...]) -> Answer:
    """Twice the first input."""
    assert inputs[0] is not None and inputs[1] is None
    return (inputs[0] * 2,)


def test_a_shape_is_captured_after_some_runs_and_reads_new_inputs() -> None:
    recorder = Again()
    replays = Replays(recorder)
    for number in range(WARM + 4):
        mine = torch.full((3,), float(number))
        assert replays.run("a", 1, (mine, None), doubled)[0].tolist() == [2.0 * number] * 3
        assert recorder.captures == (number >= WARM) and replays.replayed == max(0, number - WARM + 1)
        # A short batch takes the plain road, and leaves what is captured as it is.
        assert replays.run(("short", number), 1, (torch.ones(2), None), doubled)[0].tolist() == [2.0, 2.0]
    assert recorder.captures == 1


def test_memory_that_moved_makes_a_captured_shape_void() -> None:
    recorder = Again()
    replays = Replays(recorder)
    for addresses in (1, 2):
        before = replays.replayed
        for _ in range(WARM):
            replays.run("a", addresses, (torch.ones(3), None), doubled)
        assert replays.replayed == before
        replays.run("a", addresses, (torch.ones(3), None), doubled)
        assert recorder.captures == addresses and replays.replayed == before + 1
    replays.forget()
    for _ in range(WARM + 1):
        replays.run("a", 2, (torch.ones(3), None), doubled)
    assert recorder.captures == 3


def test_few_shapes_are_captured_and_none_without_a_recorder() -> None:
    recorder = Again()
    replays = Replays(recorder)
    for _ in range(WARM + 1):
        for shape in range(MOST + 3):
            replays.run(shape, 1, (torch.ones(3), None), doubled)
    assert recorder.captures == MOST
    plainly = Replays(None)
    for _ in range(WARM + 2):
        plainly.run("a", 1, (torch.ones(3), None), doubled)
    assert plainly.replayed == 0


def losses(folder: Path, replayed: bool) -> tuple[list[float], Any, Replays]:
    """The losses of eight steps on two sizes of batches, the worker, and its replays."""
    from benchmarks import gpu
    from des_core.engine.worker import worker_of

    with gpu.lone(torch.device("cpu")) as peers:
        config = gpu.config_of("deepfm", 24, 3, "cpu", "triton", folder)
        worker = worker_of(pin(config, gpu.dataset_of(config, 40, 3, folder)), peers)
        recorder = Again()
        worker.replays = Replays(recorder if replayed else None)  # type: ignore[attr-defined]
        tables, _ = gpu.batches_of(24, 4, 40, 3)
        tables = [table if number != 3 else table.slice(0, 7) for number, table in enumerate(tables)] * 2
        found = []
        for number, table in enumerate(tables, 1):
            # The table moves once, when all is captured.
            if number == 7:
                worker.table.keys._grow(worker.table.keys.used, 10_000)  # type: ignore[attr-defined]
            found.append(worker.step(worker._make_ready(table, number), 1.0 if number < 6 else 0.5))
        worker.settle()
        return found, worker, worker.replays  # type: ignore[attr-defined]


def test_replayed_steps_are_plain_steps(tmp_path: Path) -> None:
    """New keys, step numbers and learning rates are read by a replay; the same bits come out."""
    pytest.importorskip("triton")
    plain, first, _ = losses(tmp_path / "plain", False)
    again, second, replays = losses(tmp_path / "replayed", True)
    assert plain == again
    assert replays.replayed == 2 and replays.recorder.captures == 1  # type: ignore[union-attr]
    rows = [worker.table.rows.read(0, worker.table.used) for worker in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*rows, strict=True))
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)

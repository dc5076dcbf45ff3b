"""How many kernels a step starts, and how many bytes it moves at least."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from des_core.run import pin


def test_a_step_of_deepfm_starts_few_kernels(tmp_path: Path) -> None:
    """Counted under the interpreter: Triton kernels, and torch's operations that compute or copy.

    A sort and a prefix sum are counted once each, though libraries start several kernels for them.
    """
    pytest.importorskip("triton")
    from benchmarks import gpu
    from des_core.engine.worker import worker_of
    from tests.engine.device.launches import Launches

    with gpu.lone(torch.device("cpu")) as peers:
        config = gpu.config_of("deepfm", 24, 3, "cpu", "triton", tmp_path)
        worker = worker_of(pin(config, gpu.dataset_of(config, 40, 3, tmp_path)), peers)
        work = worker._on_device  # type: ignore[attr-defined]
        launches = Launches()

        def counted(*args: object, **kwargs: object) -> object:
            with launches:
                return work(*args, **kwargs)

        tables, _ = gpu.batches_of(24, 3, 40, 3)
        for number, table in enumerate(tables, 1):
            launches.counts.clear()
            if number == 3:
                worker._on_device = counted  # type: ignore[attr-defined]
            worker.step(worker._make_ready(table, number), 1.0)
        worker.settle()
    kernels = sum(many for name, many in launches.counts.items() if name.startswith("kernel"))
    assert kernels <= 13, launches.counts
    assert sum(launches.counts.values()) <= 48, launches.counts

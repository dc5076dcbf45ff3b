"""What every test shares: quiet, single-threaded libraries, the shared data's place, and who may skip."""

import os
from pathlib import Path
from typing import Any

import pytest

# Before torch and numba read them: tests start many processes on few cores.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of everyday data sets: DES_DATA, or ../shared/data beside the checkout."""
    folder = Path(os.environ.get("DES_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}; name their folder in DES_DATA")
    return folder.resolve()


FIRST = ("engine", "test_benchmarks.py", "test_end_to_end.py", "test_local.py", "test_peers.py")
"""Folders and files that take longest: begun first, they leave no process waiting for the other at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: min((n for n, name in enumerate(FIRST) if name in item.path.parts), default=len(FIRST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A process takes whole files, and the engine's all at once: they share groups of worker processes."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "tests/engine" if file.startswith("tests/engine/") else file

    return ByFile(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cluster"):
        missing = [name for name in ("KUBECONFIG", "DES_IMAGE") if name not in os.environ]
        if missing:
            pytest.skip(f"needs a cluster: {' and '.join(missing)} not set")
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"skipped: {len(terminalreporter.stats.get('skipped', []))}")

"""What every test shares: quiet, single-threaded libraries, the shared data's place, and who may skip."""

import os
import signal
from pathlib import Path

import pytest

# Before torch and numba read them: tests start many processes on few cores.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

# A shell gives its background jobs an ignored SIGINT, which every process of a test would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of everyday data sets: DES_DATA, or ../shared/data beside the checkout."""
    folder = Path(os.environ.get("DES_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}; name their folder in DES_DATA")
    return folder.resolve()


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

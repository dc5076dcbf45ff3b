"""What every test shares: quiet, single-threaded libraries, the shared data's place, and who may skip."""

import os
import signal
import socket
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.engine.group import Group

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


@pytest.fixture(scope="session")
def group() -> Iterator[Callable[[int], "Group"]]:
    """``group(n)`` is the session's group of n real worker processes, started on first use."""
    from tests.engine.group import Group

    groups: dict[int, Group] = {}

    def get(workers: int) -> Group:
        if workers in groups and groups[workers].broken:
            groups.pop(workers).close()
        if workers not in groups:
            groups[workers] = Group(workers)
        return groups[workers]

    yield get
    for started in groups.values():
        started.close()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of a local S3 server."""
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Address of a new, empty bucket on a local S3 server that the environment names."""
    for name, value in (
        ("AWS_ENDPOINT_URL", s3_server),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
    ):
        monkeypatch.setenv(name, value)
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    urllib.request.urlopen(urllib.request.Request(f"{s3_server}/{name}", method="PUT")).close()
    return f"s3://{name}"


@pytest.fixture(scope="session")
def gs_server() -> Iterator[str]:
    """Address of a local server of Google's storage API."""
    from gcp_storage_emulator.server import create_server

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = create_server("127.0.0.1", port, in_memory=True)
    server.start()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture
def gs_bucket(gs_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Address of a new, empty bucket on that server."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gs_server)
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    request = urllib.request.Request(
        f"{gs_server}/storage/v1/b?project=p", f'{{"name": "{name}"}}'.encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request).close()
    return f"gs://{name}"


FIRST = ("engine", "test_daily.py", "test_benchmarks.py", "test_end_to_end.py", "test_local.py", "test_peers.py")
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
            if file.startswith("tests/engine/device/"):
                return "tests/engine/device"
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

"""A Postgres server of Debian's package, for the tests that MLflow keeps its registry there."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """Address of an empty database on a server of our own, with a password in it."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not found:
        reason = "no Postgres server under /usr/lib/postgresql; apt-get install postgresql"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="des-postgres-") as folder:
        # The server refuses to run as root.
        user: list[str] = []
        if os.geteuid() == 0:
            owner = pwd.getpwnam("postgres")
            os.chown(folder, owner.pw_uid, owner.pw_gid)
            user = ["setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups"]
        bin_, data = found[-1].parent, f"{folder}/data"
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        password = Path(folder, "password")
        password.write_text("p/w:secret")
        password.chmod(0o644)

        def call(*words: str) -> None:
            subprocess.run([*user, *words], check=True, cwd=folder, stdout=subprocess.DEVNULL)

        initdb = ("--auth=scram-sha-256", "--username=mlflow", f"--pwfile={password}", "--no-sync")
        call(f"{bin_}/initdb", "--pgdata", data, *initdb)
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        call(f"{bin_}/pg_ctl", "--pgdata", data, "--wait", "--log", f"{folder}/log", "--options", options, "start")
        try:
            yield f"postgresql://mlflow:p%2Fw:secret@127.0.0.1:{port}/postgres"
        finally:
            call(f"{bin_}/pg_ctl", "--pgdata", data, "--wait", "--mode", "immediate", "stop")
            shutil.rmtree(data, ignore_errors=True)

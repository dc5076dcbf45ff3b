"""Temporary folders under one, which the next start sweeps of what dead processes left."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from des_core import scratch


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_folder_is_gone_after_its_block_and_nobody_elses_is(temporary: Path) -> None:
    base = temporary / f"des-{os.getuid()}"
    mine = scratch.make("serve")
    with pytest.raises(RuntimeError), scratch.folder("run") as path:
        assert Path(path).parent == base and Path(path).name.startswith(f"{os.getpid()}-run-")
        (Path(path) / "file").write_text("x")
        raise RuntimeError
    assert [str(path) for path in base.iterdir()] == [mine]
    assert base.stat().st_mode & 0o777 == 0o700


def test_what_dead_processes_left_goes_and_what_is_not_ours_stays(temporary: Path) -> None:
    base = temporary / f"des-{os.getuid()}"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (f"{dead.pid}-run-x", "1-run-x", "notes", f"{os.getpid()}-run-x"):
        (base / name).mkdir(parents=True)
    with scratch.folder("run"):
        pass
    assert sorted(path.name for path in base.iterdir()) == sorted(["1-run-x", "notes", f"{os.getpid()}-run-x"])


def test_a_name_that_another_has_taken_is_done_without(temporary: Path) -> None:
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    (temporary / f"des-{os.getuid()}").symlink_to(elsewhere)
    with scratch.folder("run") as path:
        assert not Path(path).is_relative_to(elsewhere)
    assert not list(elsewhere.iterdir())

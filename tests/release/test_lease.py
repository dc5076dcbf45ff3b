"""A lease that cannot be believed stops no run."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from des_core import storage
from des_core.errors import BusyError
from des_core.recurring import lease
from tests.finished import config_of


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"holder": 1}', b"\xff\xfe"])
def test_a_damaged_lease_is_replaced_and_told(tmp_path: Path, text: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    config = config_of(tmp_path)
    storage.write_bytes(lease.uri_of(config), text)
    lease.take(config, "mine", os.getpid())
    assert "is no lease (damaged?); it is replaced" in capfd.readouterr().err
    assert storage.read_json(lease.uri_of(config))["holder"] == "mine"


def test_a_lease_of_the_far_future_is_replaced(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = config_of(tmp_path)
    theirs = lease.Lease(holder="theirs", host="elsewhere", pid=0, expires=time.time() + 1e9)
    theirs.write(lease.uri_of(config))
    lease.take(config, "mine", os.getpid())
    assert "ends later than any lease may" in capfd.readouterr().err
    theirs.model_copy(update={"expires": time.time() + lease.PIPELINE_S}).write(lease.uri_of(config))
    with pytest.raises(BusyError, match="theirs on elsewhere"):
        lease.take(config, "mine", os.getpid())

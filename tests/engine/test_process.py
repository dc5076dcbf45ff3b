"""Which device a worker takes."""

from __future__ import annotations

import pytest
import torch

from des_core.config import Config, parse_config
from des_core.engine import process
from des_core.engine.process import device_of
from des_core.errors import ConfigError


def config(device: str) -> Config:
    """A config for a device."""
    return parse_config(
        {
            "run": {"name": "a"},
            "source": {"path": "a.csv"},
            "fields": [{"name": "a"}],
            "train": {"device": device},
            "storage": {"root": "a"},
            "registry": {"tracking_uri": "sqlite:///a.db"},
        }
    )


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("LOCAL_RANK", "1")


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of(config("auto")) == device_of(config("cpu")) == torch.device("cpu")
    with pytest.raises(ConfigError, match="torch sees no GPU here"):
        device_of(config("cuda"))


def test_each_worker_has_a_gpu(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert device_of(config("auto")) == device_of(config("cuda")) == torch.device("cuda", 1)
    assert device_of(config("cpu")) == torch.device("cpu")


def test_more_workers_than_gpus(gpus: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"3 workers need a GPU each, and there are 2 here; set train.workers to 2"):
        device_of(config("cuda"))
    assert device_of(config("auto")) == torch.device("cpu")
    assert "use=cpu" in capfd.readouterr().err


def test_a_worker_without_memory_has_a_code_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DES_ERROR_FILE", raising=False)
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        assert process._failed(error, 1) == 1
        assert "code=out-of-memory worker=1" in capfd.readouterr().err

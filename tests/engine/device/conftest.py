"""Kernels run under Triton's interpreter, or on a GPU with ``-m gpu``."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports Triton.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where kernels run."""
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed; make test installs it on Linux")
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("kernels are compiled here, and run on the GPU")
    return torch.device(request.param)

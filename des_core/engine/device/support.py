"""Whether the Triton kernels can run here.

Without a GPU they run on CPU tensors under Triton's interpreter (TRITON_INTERPRET=1, set before Triton is imported),
which is how tests hold their laws; it is far too slow for anything else.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch

from des_core.errors import UserError
from des_core.log import byte_text

LEAST_CAPABILITY = (7, 0)
"""Compute capability that Triton's atomics and shuffles need: Volta and later."""


def interpreted() -> bool:
    """Whether Triton interprets kernels instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on a device of a tensor of the host, for which the host does not wait."""
    # A copy from memory that is not pinned, torch.tensor(.., device=..) too, waits for all that runs there.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def why_not(device: torch.device) -> str:
    """Why the kernels cannot run on a device; empty if they can."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu":
        return "" if interpreted() else "they need a GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"they need compute capability {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}, {device} has " + ".".join(
            map(str, capability)
        )
    return ""


def kernel_type(dtype: torch.dtype) -> Any:
    """Triton's name of a type."""
    import triton.language as tl

    return {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16}[dtype]


def no_room(device: torch.device, what: str, needed: int, held: int, each: int) -> UserError:
    """The error of a device whose memory is full.

    Args:
        what: was to be made.
        needed: bytes of it.
        held: rows that are there.
        each: bytes of a row with its share of the index.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    return UserError(
        f"{what} need {byte_text(needed)} on {device}, which has {byte_text(free)} free beside the {held:,} rows "
        f"there; set table.max_rows to at most {held + free // each:,} per worker, lower model.factors, or use "
        "more GPUs"
    )

"""Processes of this machine, and the memory that they may use."""

from __future__ import annotations

import math
import os
from pathlib import Path


def is_alive(pid: int) -> bool:
    """Whether there is a process of this id, whoever it belongs to."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def memory_bytes(cgroups: str = "/sys/fs/cgroup", meminfo: str = "/proc/meminfo") -> float:
    """Bytes that this process and its children may use: the machine's, or the control group's where that is less."""
    total = next(
        (float(line.split()[1]) * 1024 for line in _text(meminfo).splitlines() if line.startswith("MemTotal:")),
        math.inf,
    )
    limits = (_text(f"{cgroups}/memory.max"), _text(f"{cgroups}/memory/memory.limit_in_bytes"))
    return min([total, *(float(limit) for limit in limits if limit.strip().isdecimal())])


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""

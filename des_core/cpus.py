"""How many CPUs this process may use."""

from __future__ import annotations

import os
from pathlib import Path


def cpu_quota(cgroups: str = "/sys/fs/cgroup") -> int:
    """CPUs that this process may use: its affinity, or the control group's quota where that is less."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for quota, period in (_quota_v2(cgroups), _quota_v1(cgroups)):
        if quota > 0 and period > 0:
            allowed = min(allowed, max(1, quota // period))
    return allowed


def _quota_v2(cgroups: str) -> tuple[int, int]:
    words = _words(f"{cgroups}/cpu.max")
    return (int(words[0]), int(words[1])) if len(words) == 2 and words[0] != "max" else (0, 0)


def _quota_v1(cgroups: str) -> tuple[int, int]:
    quota, period = _words(f"{cgroups}/cpu/cpu.cfs_quota_us"), _words(f"{cgroups}/cpu/cpu.cfs_period_us")
    return (int(quota[0]), int(period[0])) if quota and period else (0, 0)


def _words(path: str) -> list[str]:
    try:
        return Path(path).read_text().split()
    except OSError:
        return []

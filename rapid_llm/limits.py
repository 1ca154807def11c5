"""What of the machine's memory and processors this process may use: its control groups' limits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from math import ceil
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def host_memory() -> int | None:
    """Bytes of memory that the process may use in all; None where the system does not tell."""
    limits = [*_numbers("memory", "memory.max", 0), *_numbers("memory", "memory.limit_in_bytes", 0)]
    if hasattr(os, "sysconf"):  # not on Windows
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits, default=None)


@cache
def processors() -> int:
    """Processors that the process may keep busy, at least 1."""
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # on Linux
        count = len(os.sched_getaffinity(0))
    quotas = [
        quota / period
        for quotas, periods in (
            (_numbers("cpu", "cpu.max", 0), _numbers("cpu", "cpu.max", 1)),
            (_numbers("cpu", "cpu.cfs_quota_us", 0), _numbers("cpu", "cpu.cfs_period_us", 0)),
        )
        for quota, period in zip(quotas, periods, strict=False)
    ]
    return max(1, min([count, *(ceil(quota) for quota in quotas)]))


def _numbers(controller: str, file: str, column: int) -> list[int]:
    """A limit of each control group that the process is in, where there is one."""
    found = []
    for group in _groups(controller):
        try:
            words = (group / file).read_text(encoding="ascii").split()
        except (OSError, ValueError):
            continue
        if len(words) > column and words[0].isdecimal() and words[column].isdecimal():
            found.append(int(words[column]))
    return found


def _groups(controller: str) -> Iterator[Path]:
    """The folders of a controller's groups, from the process's own to the outermost."""
    try:
        lines = _MEMBERSHIP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        root = _ROOT if not controllers else _ROOT / controller
        inside = Path(path.lstrip("/"))
        # In a container the path is the host's, and the root is the container's own group.
        for parent in (inside, *inside.parents):
            yield root / parent

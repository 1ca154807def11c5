"""Memory and processors that this process may use, within its control groups' limits."""

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
    limits = [
        limit
        for group in _groups("memory")
        for name in ("memory.max", "memory.limit_in_bytes")
        for limit in _numbers(group / name)[:1]
    ]
    if (physical := physical_memory()) is not None:
        limits.append(physical)
    return min(limits, default=None)


def physical_memory() -> int | None:
    """Bytes of the machine's memory; None where the system does not tell."""
    if not hasattr(os, "sysconf"):  # on Windows
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@cache
def processors() -> int:
    """Processors that the process may keep busy, at least 1."""
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # on Linux
        count = len(os.sched_getaffinity(0))
    for group in _groups("cpu"):
        first = [_numbers(group / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
        for limit in (_numbers(group / "cpu.max"), [*first[0], *first[1]]):
            if len(limit) == 2 and limit[1] > 0:
                count = min(count, ceil(limit[0] / limit[1]))
    return max(1, count)


def _numbers(file: Path) -> list[int]:
    """The numbers in the file of a limit; none where it has no limit, or is not there."""
    try:
        words = file.read_text(encoding="ascii").split()
        return [int(word) for word in words] if all(map(str.isdecimal, words)) else []
    except (OSError, ValueError):
        return []


def _groups(controller: str) -> Iterator[Path]:
    """The folders of a controller's groups, from the process's own to the outermost."""
    try:
        # A group's name may be any bytes.
        lines = os.fsdecode(_MEMBERSHIP.read_bytes()).splitlines()
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

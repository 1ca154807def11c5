"""Memory and processors in a container: the control groups' limits, not the machine's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from rapid_llm import limits
from rapid_llm.models import device_memory

MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of control groups of which the process is in ``/a/b``."""
    monkeypatch.setattr(limits, "_ROOT", tmp_path)
    monkeypatch.setattr(limits, "_MEMBERSHIP", tmp_path / "membership")
    (tmp_path / "membership").write_text("0::/a/b\n")
    (tmp_path / "a" / "b").mkdir(parents=True)
    limits.processors.cache_clear()
    yield tmp_path
    limits.processors.cache_clear()


def test_without_limits_all_of_the_machine_may_be_used(groups: Path) -> None:
    (groups / "a" / "memory.max").write_text("max\n")
    (groups / "a" / "cpu.max").write_text("max 100000\n")
    assert device_memory(torch.device("cpu")) == MACHINE
    assert limits.processors() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("group", ["", "a", "a/b"])
def test_the_tightest_limit_of_any_group_counts(groups: Path, group: str) -> None:
    (groups / "a" / "b" / "memory.max").write_text(f"{MACHINE * 2}\n")
    (groups / group / "memory.max").write_text("2097152\n")
    (groups / group / "cpu.max").write_text("50000 100000\n")
    assert device_memory(torch.device("cpu")) == 2097152
    assert limits.processors() == 1


def test_limits_of_the_first_version_count_as_well(groups: Path) -> None:
    (groups / "membership").write_text("5:cpu,cpuacct:/c\n4:memory:/c\n")
    for controller in ("memory", "cpu"):
        (groups / controller / "c").mkdir(parents=True)
    (groups / "memory" / "c" / "memory.limit_in_bytes").write_text("4194304\n")
    (groups / "cpu" / "c" / "cpu.cfs_quota_us").write_text("100000\n")
    (groups / "cpu" / "c" / "cpu.cfs_period_us").write_text("100000\n")
    assert device_memory(torch.device("cpu")) == 4194304
    assert limits.processors() == 1


def test_a_container_sees_its_own_group_as_the_root(groups: Path) -> None:
    (groups / "membership").write_text("0::/system.slice/docker-123.scope\n")
    (groups / "memory.max").write_text("1048576\n")
    assert device_memory(torch.device("cpu")) == 1048576


def test_a_quota_counts_with_the_period_of_its_own_group(groups: Path) -> None:
    (groups / "membership").write_text("5:cpu:/c/d\n")
    (groups / "cpu" / "c" / "d").mkdir(parents=True)
    (groups / "cpu" / "c" / "d" / "cpu.cfs_quota_us").write_text("-1\n")
    (groups / "cpu" / "c" / "d" / "cpu.cfs_period_us").write_text("1000\n")
    (groups / "cpu" / "c" / "cpu.cfs_quota_us").write_text("100000\n")
    (groups / "cpu" / "c" / "cpu.cfs_period_us").write_text("100000\n")
    assert limits.processors() == 1


@pytest.mark.parametrize("content", ["100 0", "100", "", "9" * 5000 + " 100", "x 100", "\xff"])
def test_a_malformed_limit_is_none(groups: Path, content: str) -> None:
    (groups / "cpu.max").write_text(content, encoding="utf-8")
    (groups / "memory.max").write_text(content if content[:3] != "100" else "x", encoding="utf-8")
    assert device_memory(torch.device("cpu")) == MACHINE
    assert limits.processors() == len(os.sched_getaffinity(0))


def test_a_groups_name_may_be_any_bytes(groups: Path) -> None:
    (groups / "membership").write_bytes(b"0::/a\xff\n")
    folder = Path(os.fsdecode(os.fsencode(groups / "a") + b"\xff"))
    folder.mkdir()
    (folder / "memory.max").write_text("2097152\n")
    assert device_memory(torch.device("cpu")) == 2097152


def test_what_cannot_be_read_is_no_limit(groups: Path) -> None:
    (groups / "membership").unlink()
    assert device_memory(torch.device("cpu")) == MACHINE

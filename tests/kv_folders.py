"""A folder of kept KV: its files, and a prompt that was saved to it."""

from __future__ import annotations

from pathlib import Path

import pytest
from kept_prompts import AMPLE, CHUNK, LONG, ask, make_forward

from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.prefix_cache.prefixes import PrefixCache

pytestmark = pytest.mark.usefixtures("warnings_are_errors")


@pytest.fixture(name="runner")
def runner_fixture() -> ModelRunner:
    return make_forward()


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch) -> None:
    monkeypatch.setattr("rapid_llm.engine.device.Device.prefill_chunk", CHUNK)


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def litter_of(folder: Path) -> list[Path]:
    """What interrupted writers have left."""
    return [path for path in folder.rglob("*") if "tmp" in path.name]


@pytest.fixture(name="saved")
def saved_fixture(runner, tmp_path):
    """The one file that a long prompt leaves."""
    folder = tmp_path / "new" / "kv"
    assert ask(PrefixCache(AMPLE, folder), runner, [*LONG, 5, 6]) == 0
    (path,) = files_of(folder)
    assert folder.stat().st_mode & 0o077 == 0
    return path


def later(path) -> PrefixCache:
    """As in another process."""
    return PrefixCache(AMPLE, path.parent)

"""The folder of kept KV: its limit, other processes, and what in it is not ours."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from kept_prompts import AMPLE, LONG, ask, text
from kv_folders import (  # noqa: F401  (fixtures)
    files_of,
    later,
    litter_of,
    runner_fixture,
    saved_fixture,
    short_chunks,
)

from rapid_llm.engine.prefix_cache import file_format
from rapid_llm.engine.prefix_cache.folder import Folder
from rapid_llm.engine.prefix_cache.prefixes import PrefixCache
from rapid_llm.engine.prefix_cache.reading import prefill_of
from rapid_llm.errors import InvalidParameterError

pytestmark = pytest.mark.usefixtures("warnings_are_errors")


def test_the_folder_keeps_what_was_used_last(runner, tmp_path, monkeypatch):
    monkeypatch.setattr("rapid_llm.engine.prefix_cache.prefixes.WORTH_SAVING", 40)
    monkeypatch.setattr("rapid_llm.engine.prefix_cache.prefixes.WORTH_LOADING", 20)
    documents = [text(60, seed) for seed in range(40, 43)]

    def question(document: int, limit: int | None = None) -> int:
        cache = PrefixCache(AMPLE, tmp_path, directory_bytes=limit)
        return ask(cache, runner, [*documents[document], 5])

    assert question(0) == 0
    (first,) = files_of(tmp_path)
    size = first.stat().st_size
    limit = 5 * size // 2  # of two files
    assert question(1, limit) == 0
    age(tmp_path)
    assert question(0, limit) == 60  # which makes it the last used
    assert question(2, limit) == 0
    assert first in files_of(tmp_path)
    assert len(files_of(tmp_path)) == 2
    assert question(0, limit) == 60
    assert question(1, size // 2) == 0  # more than the limit: nothing goes for it
    assert first in files_of(tmp_path)


def age(folder: Path, seconds: float = 10.0) -> None:
    """Make all files look older than they are, in the same order."""
    for path in folder.rglob("*"):
        found = path.stat()
        os.utime(path, (found.st_atime - seconds, found.st_mtime - seconds))


WRITER = """
import random, sys
from pathlib import Path
from rapid_llm.engine.prefix_cache.folder import Folder
folder, limit, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
draws = random.Random(seed)
for number in range(40):
    n = draws.randrange(1, limit)
    name = f"{seed:016x}-{number:016x}-{draws.randrange(16**16):016x}.safetensors"
    Folder(folder, limit).write(name, n, lambda path: path.write_bytes(bytes(n)))
"""


def test_the_limit_holds_at_every_moment_under_concurrent_writers(tmp_path):
    limit = 100_000
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(limit), str(seed)])
        for seed in range(3)
    ]
    most = 0
    while any(writer.poll() is None for writer in writers):
        total = 0
        for path in tmp_path.rglob("*"):
            with suppress(OSError):  # deleted since it was listed
                total += path.stat().st_size if path.is_file() else 0
        most = max(most, total)
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert limit // 4 < sum(path.stat().st_size for path in files_of(tmp_path)) <= limit
    # A file that was renamed or deleted during the count may have been counted with its successor.
    assert most <= 2 * limit
    assert litter_of(tmp_path) == []


def test_room_is_kept_for_files_that_are_being_written(tmp_path):
    folder = Folder(tmp_path, 1000)

    def other(path: Path) -> None:
        assert not Folder(tmp_path, 1000).write(name_of(2), 500, Path.touch)
        assert Folder(tmp_path, 1000).write(name_of(3), 400, lambda p: p.write_bytes(bytes(400)))
        assert not Folder(tmp_path, 1000).write(name_of(2), 500, Path.touch)
        assert [path.name for path in files_of(tmp_path)] == [name_of(3)]  # nothing was deleted
        path.write_bytes(bytes(600))

    assert folder.write(name_of(1), 600, other)
    assert folder.nbytes == 1000
    assert folder.write(name_of(4), 900, Path.touch)
    assert [path.name for path in files_of(tmp_path)] == [name_of(4)]
    assert not folder.write(name_of(5), 1001, Path.touch)
    assert [path.name for path in files_of(tmp_path)] == [name_of(4)]


def name_of(number: int, group: int = 0) -> str:
    return f"{group:016x}-{group:016x}-{number:016x}.safetensors"


def test_without_a_limit_a_quarter_of_the_free_space_is_used(tmp_path, monkeypatch):
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    folder = Folder(tmp_path, None)
    for number, free in enumerate((1000, 900, 800)):
        usage.free = free
        assert folder.write(name_of(number), 100, lambda path: path.write_bytes(bytes(100)))
    assert len(files_of(tmp_path)) == 2
    assert not folder.write(name_of(9), 300, Path.touch)


KILLED = """
import os, sys
from pathlib import Path
from rapid_llm.engine.prefix_cache.folder import Folder

def killed(path):
    path.write_bytes(bytes(100))
    path.with_name(".tmpAb3dE6").touch()
    os.kill(os.getpid(), 9)

Folder(Path(sys.argv[1]), None).write("0" * 16 + "-" + "0" * 16 + "-" + "0" * 16, 100, killed)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal")
def test_what_a_killed_writer_leaves_is_swept_when_it_is_old(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    (tmp_path / ".tmpAb3dE6").touch()
    (tmp_path / ".tmp-notes of mine").touch()
    assert len(litter_of(tmp_path)) == 4
    folder = Folder(tmp_path, None)
    assert folder.write(name_of(1), 10, Path.touch)
    assert len(litter_of(tmp_path)) == 4  # its writer may be at work
    age(tmp_path, 3600.0)
    assert folder.write(name_of(2), 10, Path.touch)
    assert [path.name for path in litter_of(tmp_path)] == [".tmp-notes of mine"]
    assert len(files_of(tmp_path)) == 2


def test_pipes_folders_and_foreign_files_are_passed_over(runner, saved):
    for name in ("notes.safetensors", "a.txt", f"{saved.stem}.bak"):
        saved.with_name(name).write_text("mine")
    beside = [saved.with_name(f"{saved.name[:34]}{n:016x}.safetensors") for n in range(2)]
    beside[0].mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(beside[1])
    assert ask(later(saved), runner, [*LONG, 6, 7]) == len(LONG)
    assert ask(PrefixCache(AMPLE, saved.parent, directory_bytes=1), runner, text(1100, 7)) == 0
    assert saved.with_name("notes.safetensors").read_text() == "mine"


def test_a_folder_that_has_not_changed_is_not_listed_again(runner, saved, monkeypatch):
    for number in range(300):
        saved.with_name(name_of(number)).touch()
    for number in range(300):  # of this model, but other documents
        saved.with_name(f"{saved.name[:16]}-{number:016x}-{0:016x}.safetensors").touch()
    age(saved.parent.parent)
    cache = later(saved)
    assert ask(cache, runner, [*LONG, 5]) == len(LONG)
    cache.clear()
    monkeypatch.setattr("os.scandir", None)
    monkeypatch.setattr(file_format, "read_header", None)
    looked_at = []
    stat = Path.stat
    with monkeypatch.context() as context:
        context.setattr(Path, "stat", lambda path, **k: looked_at.append(path) or stat(path, **k))
        assert cache._from_file(runner, prefill_of(runner, [*LONG, 6]), 1501) is not None
    assert set(looked_at) <= {saved, saved.parent}


def test_a_file_that_another_process_writes_is_found(runner, saved):
    cache, other = later(saved), [*text(1100, seed=50), 5]
    assert ask(cache, runner, [*LONG, 5]) == len(LONG)
    ask(later(saved), runner, other)
    assert ask(cache, runner, [*other, 6]) == len(other) - 1
    for path in files_of(saved.parent):
        path.unlink()
    cache.clear()
    assert ask(cache, runner, [*other, 7]) == 0


def test_a_limit_needs_a_folder() -> None:
    with pytest.raises(InvalidParameterError, match="kv_cache_dir_bytes=5 limits no folder"):
        PrefixCache(AMPLE, directory_bytes=5)
    with pytest.raises(InvalidParameterError, match="kv_cache_dir_bytes=-5 is negative"):
        PrefixCache(AMPLE, Path("kv"), directory_bytes=-5)

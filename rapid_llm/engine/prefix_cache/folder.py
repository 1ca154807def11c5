"""A folder of files that several processes share, with cached names and a limit in bytes."""

from __future__ import annotations

import os
import re
import shutil
import stat
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

SUFFIX = ".safetensors"

_NAME = re.compile(r"(?P<group>[0-9a-f]{16}-[0-9a-f]{16})-[0-9a-f]{16}" + re.escape(SUFFIX))
_UNFINISHED = re.compile(r"[0-9a-f]{32}-(?P<nbytes>\d+)\.tmp")
_LIBRARY_LEFTOVER = re.compile(r"\.tmp\w{6}")  # of safetensors, which writes to such a file first

_STALE = 3600.0
"""Seconds after which an unfinished file is taken for that of a killed writer."""

_SETTLED = 2.0
"""Seconds between changes of a folder after which their modification times surely differ."""

_LOCK_SECONDS = 30.0


class Version(NamedTuple):
    """Identity of a file's content: another file of the same name has another version."""

    inode: int
    nbytes: int
    changed: int


def version_of(path: Path) -> Version | None:
    """The version of a regular file; None if there is none (any more)."""
    try:
        found = path.stat()
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode):  # to open a pipe would wait for its writer
        return None
    return Version(found.st_ino, found.st_size, found.st_mtime_ns)


class Folder:
    """Files named ``<group>-<content>.safetensors``, deleted in the order of their last use.

    The folder is listed again only after it has changed. A file's modification time is that of its
    last use. Other files are ignored.

    Args:
        path: the folder, created with the first file, with access for its owner only.
        budget: maximum number of bytes of all files, those being written included; None is a
            quarter of what is free on the file system, these files counted as free.
    """

    def __init__(self, path: Path, budget: int | None) -> None:
        self.path = path
        self._budget = budget
        self._unfinished = path / ".unfinished"
        self._groups: dict[str, set[str]] = {}
        self._listed: tuple[int, bool] | None = None  # time of change, and whether it is settled

    @property
    def nbytes(self) -> int:
        """Bytes of all files at this moment; 0 if the folder cannot be read."""
        try:
            return sum(used.nbytes for used in self._files())
        except OSError:
            return 0

    def names(self, group: str) -> Collection[str]:
        """Names of the files of a group."""
        try:
            changed = self.path.stat().st_mtime_ns
            if self._listed != (changed, True):
                if self._listed is None:
                    self._sweep()
                settled = time.time_ns() - changed > _SETTLED * 1e9
                self._groups = self._list()
                self._listed = changed, settled
        except OSError:  # not there, or not readable (any more)
            self._groups, self._listed = {}, None
        return self._groups.get(group, ())

    def use(self, path: Path) -> None:
        """Make a file the most recently used."""
        with suppress(OSError):
            os.utime(path)

    def discard(self, path: Path) -> bool:
        """Delete a file; returns whether it is gone."""
        try:
            path.unlink(missing_ok=True)
        except OSError:  # on Windows it may be open
            return False
        return True

    def write(self, name: str, nbytes: int, write: Callable[[Path], None]) -> bool:
        """Write a file, so that readers never see half of it and the budget holds at any moment.

        Args:
            name: name of the file.
            nbytes: maximum size of the file in bytes.
            write: function of a path that writes the file there.

        Returns:
            Whether the budget had room for the file beside those that are being written.

        Raises:
            OSError: the folder cannot be written to.
        """
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._unfinished.mkdir(exist_ok=True, mode=0o700)
        unfinished = self._unfinished / f"{uuid.uuid4().hex}-{nbytes}.tmp"
        with self._locked():
            self._sweep()
            if not self._make_room(nbytes):
                return False
            unfinished.touch(mode=0o600, exist_ok=False)  # its name reserves the bytes
        try:
            write(unfinished)
            os.replace(unfinished, self.path / name)
        finally:
            with suppress(OSError):
                unfinished.unlink()
        return True

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = FileLock(self._unfinished / "lock", timeout=_LOCK_SECONDS, mode=0o600)
        try:
            lock.acquire()
        except Timeout as error:
            raise OSError(f"another process has kept {error.lock_file} locked") from error
        try:
            yield
        finally:
            lock.release()

    def _make_room(self, nbytes: int) -> bool:
        """Delete files until ``nbytes`` more fit; False, with none deleted, if they never would."""
        files = sorted(self._files(), key=lambda file: file.used)
        writing = sum(self._reserved())
        total = sum(file.nbytes for file in files) + writing
        budget = self._budget
        if budget is None:
            free = shutil.disk_usage(self.path).free
            budget = (free + sum(file.nbytes for file in files)) // 4
        if writing + nbytes > budget:
            return False
        for file in files:
            if total + nbytes <= budget:
                break
            if self.discard(file.path):
                total -= file.nbytes
        return total + nbytes <= budget

    def _reserved(self) -> Iterator[int]:
        for entry in _scan(self._unfinished):
            if match := _UNFINISHED.fullmatch(entry.name):
                yield int(match["nbytes"])

    def _files(self) -> Iterator[_File]:
        for entry in _scan(self.path):
            if _NAME.fullmatch(entry.name) and (found := version_of(Path(entry))):
                yield _File(Path(entry), found.nbytes, found.changed)

    def _list(self) -> dict[str, set[str]]:
        groups: dict[str, set[str]] = defaultdict(set)
        for entry in _scan(self.path):
            if match := _NAME.fullmatch(entry.name):
                groups[match["group"]].add(entry.name)
        return dict(groups)

    def _sweep(self) -> None:
        """Delete unfinished files of killed writers."""
        for folder in (self._unfinished, self.path):
            for entry in _scan(folder):
                ours = _UNFINISHED.fullmatch(entry.name) or _LIBRARY_LEFTOVER.fullmatch(entry.name)
                if ours and (found := version_of(Path(entry))) and _is_stale(found):
                    with suppress(OSError):
                        os.unlink(entry)


class _File(NamedTuple):
    """A file, its size, and the time of its last use."""

    path: Path
    nbytes: int
    used: int


def _is_stale(version: Version) -> bool:
    return time.time_ns() - version.changed > _STALE * 1e9


def _scan(folder: Path) -> Iterator[os.DirEntry[str]]:
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        yield from entries

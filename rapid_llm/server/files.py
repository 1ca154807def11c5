"""Uploaded documents: read once, kept as text in a folder that only its owner may open."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryDirectory, mkstemp
from threading import Lock
from typing import IO

from rapid_llm.context.documents import SUFFIXES, read_document
from rapid_llm.errors import DocumentError
from rapid_llm.server.errors import NO_RETRY, ApiError

_ID = re.compile(r"file-[0-9a-f]{32}")
_BLOCK = 1 << 20

PURPOSES = ("user_data", "assistants")
"""OpenAI's purposes of files that are read as documents; the first one is the default."""


@dataclass(frozen=True)
class StoredFile:
    """An uploaded document.

    Attributes:
        id: id that the server made.
        filename: name that the client gave, never used as a path.
        bytes: length of the uploaded file in bytes.
        characters: length of its text in characters.
        created_at: time of the upload in seconds since 1970.
        purpose: purpose that the client gave.
    """

    id: str
    filename: str
    bytes: int
    characters: int
    created_at: int
    purpose: str

    def as_dict(self) -> dict[str, object]:
        """The file as OpenAI's clients read it."""
        return {"object": "file", "status": "processed"} | asdict(self)


class FileStore:
    """A folder of uploaded documents, of which only the texts are kept.

    Safe for several threads and, as files appear and vanish whole, for several processes.

    Args:
        folder: folder of the store; None for one that is deleted with the object.
        most: maximum bytes of all texts together, with what is known of them.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: Path | None, most: int) -> None:
        self._own = TemporaryDirectory(prefix="rapid-llm-files-") if folder is None else None
        self._folder = folder or Path(self._own.name if self._own else "")
        self._most = most
        self._lock = Lock()  # one file is read at a time: PDFium has no threads
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder.chmod(0o700)

    def add(self, file: IO[bytes], filename: str, purpose: str) -> StoredFile:
        """Read an uploaded file and keep its text.

        Args:
            file: the uploaded bytes.
            filename: the client's name of it, which tells the format by its suffix.
            purpose: the client's word for what it is for, one of :data:`PURPOSES`.

        Raises:
            DocumentError: the format is unknown, or there is no text.
            ApiError: the texts together exceed the limit, or the disk is full.
            MissingDependencyError: the package that reads its format is not installed.
        """
        name = f"file-{token_hex(16)}"
        suffix = Path(filename).suffix.lower()
        with self._lock, _room():
            handle, path = mkstemp(
                prefix=name, suffix=suffix if suffix in SUFFIXES else "", dir=self._folder
            )
            try:
                with os.fdopen(handle, "wb") as copy:
                    size = 0
                    while block := file.read(_BLOCK):
                        copy.write(block)
                        size += len(block)
                text = _read(path, filename)
            finally:
                os.unlink(path)
            data = text.encode()
            stored = StoredFile(name, filename, size, len(text), int(time.time()), purpose)
            about = json.dumps(asdict(stored)).encode()
            if self._used() + len(data) + len(about) > self._most:
                raise ApiError(
                    413,
                    f"the texts and names of all files together would exceed {self._most:,} "
                    "bytes: delete files that are no longer needed",
                    code="storage_full",
                )
            self._write({f"{name}.txt": data, f"{name}.json": about})
        return stored

    def get(self, file_id: str) -> StoredFile:
        """What is known of a file.

        Raises:
            ApiError: there is none of this id.
        """
        with suppress(OSError, ValueError, TypeError):
            return StoredFile(**json.loads(self._path(file_id, "json").read_bytes()))
        raise _missing(file_id)

    def text(self, file_id: str) -> str:
        """Text of a file.

        Raises:
            ApiError: there is none of this id.
        """
        try:
            return self._path(file_id, "txt").read_bytes().decode()
        except OSError:
            raise _missing(file_id) from None

    def delete(self, file_id: str) -> None:
        """Delete a file.

        Raises:
            ApiError: there is none of this id.
        """
        self.get(file_id)
        for suffix in ("json", "txt"):
            self._path(file_id, suffix).unlink(missing_ok=True)

    def __iter__(self) -> Iterator[StoredFile]:
        """All files, the oldest first."""
        known = []
        for path in self._folder.glob("file-*.json"):
            with suppress(ApiError):  # deleted meanwhile
                known.append(self.get(path.stem))
        return iter(sorted(known, key=lambda file: (file.created_at, file.id)))

    def close(self) -> None:
        """Delete the folder if it is the object's own."""
        if self._own is not None:
            self._own.cleanup()

    def _path(self, file_id: str, suffix: str) -> Path:
        if not _ID.fullmatch(file_id):
            raise _missing(file_id)
        return self._folder / f"{file_id}.{suffix}"

    def _write(self, files: Mapping[str, bytes]) -> None:
        """Write files, all or none of them; the last is the one that tells of the others."""
        written: dict[str, str] = {}
        try:
            for name, data in files.items():
                handle, written[name] = mkstemp(dir=self._folder)  # readable by its owner only
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
            for name, path in written.items():
                os.replace(path, self._folder / name)
        finally:
            for path in written.values():
                Path(path).unlink(missing_ok=True)

    def _used(self) -> int:
        sizes = 0
        for path in self._folder.glob("file-*"):
            with suppress(OSError):
                sizes += path.stat().st_size
        return sizes


@contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ApiError(
            507,
            f"the server cannot keep the file ({error.strerror}): make room on its disk",
            code="storage_failed",
            headers=NO_RETRY,
        ) from error


def _read(path: str, filename: str) -> str:
    try:
        return read_document(path)
    except DocumentError as error:  # of the client's file, not of the server's path
        raise DocumentError(str(error).replace(path, repr(filename))) from None


def _missing(file_id: str) -> ApiError:
    return ApiError(
        404,
        f"no file has the id {file_id!r}: upload it, or list the files with GET /v1/files",
        param="file_id",
        code="file_not_found",
    )

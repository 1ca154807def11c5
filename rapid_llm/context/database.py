"""Chroma databases, one per folder, each used by one thread of one process at a time."""

from __future__ import annotations

import hashlib
import uuid
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias
from weakref import WeakSet

from filelock import FileLock

from rapid_llm.context.extras import first_line, import_extra
from rapid_llm.errors import (
    ForkedProcessError,
    InvalidParameterError,
    ModelError,
    RapidError,
)
from rapid_llm.forked import ProcessLock, in_child

if TYPE_CHECKING:
    from chromadb.api import ServerAPI
    from chromadb.api.models.Collection import Collection

LOCK_SECONDS = 300
"""Time limit for the lock of a folder, which a process holds for one operation at a time."""

MEMORY_BYTES = 2**29
"""Maximum bytes of the vectors in memory, see :class:`rapid_llm.context.store.ChunkStore`."""

_MOST_OPEN = 8  # folders kept open; each takes about 20 open files
# Name prefixes of collections: one per embedder; in version 0.1.0 one per document.
_COLLECTION, _OLD_COLLECTION = "rapid-llm-", "rapid-"

Owner: TypeAlias = tuple[str, str]
"""What vectors belong to: the embedder's name, and the key of a document."""


class Searched(Protocol):
    """Chunks that are searched, whose vectors stay in memory as long as the object lives."""

    owners: frozenset[Owner]


def place_of(directory: Path | None) -> str:
    """Description of a database's place, for errors."""
    return "the memory of this process" if directory is None else f"store='{directory}'"


def other_length(reason: str) -> ModelError:
    """The error for vectors of another length than those stored."""
    return ModelError(
        f"the embedder's vectors differ in length from those stored under its name ({reason}): "
        "give other vectors another name"
    )


class _Recent:
    """Bytes of the vectors in memory, those of the documents least recently searched first."""

    def __init__(self) -> None:
        self._bytes: OrderedDict[Owner, int] = OrderedDict()
        self._searched: WeakSet[Searched] = WeakSet()

    def search(self, chunks: Searched) -> None:
        """Note that chunks are searched, while the object lives."""
        self._searched.add(chunks)
        for owner in chunks.owners & self._bytes.keys():
            self._bytes.move_to_end(owner)

    def add(self, owners: Iterable[Owner], size: int) -> list[Owner]:
        """Count vectors of ``size`` bytes each; returns whose are to be dropped."""
        for owner in owners:
            self._bytes[owner] = self._bytes.pop(owner, 0) + size
        total, dropped = sum(self._bytes.values()), list[Owner]()
        if total <= MEMORY_BYTES:
            return dropped
        needed = {owner for chunks in self._searched for owner in chunks.owners}
        for owner in [each for each in self._bytes if each not in needed]:
            if total <= MEMORY_BYTES:
                break
            total -= self._bytes.pop(owner)
            dropped.append(owner)
        return dropped


class Database:
    """A Chroma database with exclusive access for one thread of one process at a time.

    Chroma does not see what other processes write: it holds parts of an index in memory, and would
    overwrite their changes. So the folder is locked for each operation, and is opened again after
    another process has used it.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._me = uuid.uuid4().hex
        self._thread = RLock()
        self._system: Any = None
        self._collections: dict[str, Collection] = {}
        self._recent = _Recent()
        self._process: Any = None
        chromadb = import_extra("chromadb", "retrieval", "a store of vectors")
        self._errors = (
            chromadb.errors.InvalidArgumentError,
            chromadb.errors.InvalidDimensionException,
        )
        with self._failures():
            if directory is not None:
                # Poll often: a process that writes much releases the lock for moments only.
                self._process = FileLock(
                    directory / "rapid-llm.lock",
                    timeout=LOCK_SECONDS,
                    mode=0o600,
                    poll_interval=0.005,
                )
            with self._exclusive() as server:
                self._warn_of_old_format(server)

    @contextmanager
    def collection(self, embedder: str) -> Iterator[Collection]:
        """An embedder's collection, with exclusive access for one operation."""
        from chromadb.api.models.Collection import Collection

        with self._failures(), self._exclusive() as server:
            if embedder not in self._collections:
                model = server.get_or_create_collection(
                    _COLLECTION + hashlib.sha256(embedder.encode()).hexdigest()[:32],
                    metadata={"embedder": embedder},
                    configuration={"hnsw": {"space": "cosine"}},
                )
                # No embedding function of Chroma's: all vectors come from the embedder.
                self._collections[embedder] = Collection(server, model, embedding_function=None)
            yield self._collections[embedder]

    def search(self, chunks: Searched) -> None:
        """Keep the vectors of chunks in memory while they are searched."""
        if self._directory is None:
            with self._thread:
                self._recent.search(chunks)

    def added(self, owners: Iterable[Owner], size: int) -> None:
        """Note that vectors of ``size`` bytes each are in memory, and drop what is too much."""
        if self._directory is None:
            with self._thread:
                for embedder, document in self._recent.add(owners, size):
                    with self.collection(embedder) as collection:
                        collection.delete(where={"document": document})

    @contextmanager
    def _exclusive(self) -> Iterator[ServerAPI]:
        with ExitStack() as held:
            held.enter_context(self._thread)
            if self._directory is not None:
                # Owner only: the folder tells which texts are in it, and Chroma unpickles files.
                # At each operation, because the folder may have been deleted.
                self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
                held.enter_context(self._process)
                last = self._directory / "rapid-llm.last"
                if not last.exists() or last.read_text() != self._me:
                    self.close()
                    last.write_text(self._me)
            if self._system is None:
                self._system = _start(self._directory)
            yield self._system.instance(_server_api())

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except RapidError:
            raise
        except self._errors as error:
            raise other_length(first_line(error)) from error
        except TimeoutError as error:
            raise InvalidParameterError(
                f"{place_of(self._directory)} has been held by another process for {LOCK_SECONDS} "
                "seconds: end that process, or give this one another folder"
            ) from error
        except Exception as error:  # of Chroma, sqlite or Rust
            self.close()  # the next call opens the folder again
            raise InvalidParameterError(
                f"{place_of(self._directory)} cannot be opened or used ({first_line(error)}): give "
                "a writable folder that is empty or a Chroma database; one that is damaged can be "
                "deleted, and its documents are embedded again"
            ) from error

    def close(self) -> None:
        """Release files and memory; the next operation opens the database again."""
        with self._thread:
            self._collections.clear()
            self._recent = _Recent()
            system, self._system = self._system, None
            if system is not None:
                system.stop()

    def _warn_of_old_format(self, server: ServerAPI) -> None:
        former = [
            collection.name
            for collection in server.list_collections()
            if collection.name.startswith(_OLD_COLLECTION)
            and not collection.name.startswith(_COLLECTION)
        ]
        if former:
            warnings.warn(
                f"{place_of(self._directory)} holds {len(former)} documents as version 0.1.0 "
                "stored them, which are no longer read: documents are embedded again; delete the "
                "folder to have its space back",
                stacklevel=6,
            )


_databases: OrderedDict[Path | None, Database] = OrderedDict()
_opening = ProcessLock()
_forked_from: list[object] = []  # databases that the parent process had open; never closed here


def database_of(directory: Path | None) -> Database:
    """The database of a folder, or the one in memory; the least recently used are closed."""
    if _forked_from:
        raise ForkedProcessError(
            f"{place_of(directory)} cannot be used in this process: it was forked from one that "
            "had used Chroma, whose threads are not here. Start processes by 'spawn' "
            "(multiprocessing.set_start_method), or make the ContextBuilder after the fork"
        )
    with _opening:
        database = _databases.get(directory) or Database(directory)
        _databases[directory] = database
        _databases.move_to_end(directory)
        folders = [folder for folder in _databases if folder is not None]
        unused = [_databases.pop(folder) for folder in folders[:-_MOST_OPEN]]
    for other in unused:
        other.close()
    return database


def _after_fork() -> None:
    # Chroma would wait forever for threads that the child does not have, even on closing.
    if _databases:
        _forked_from.append(dict(_databases))


in_child(_after_fork)


def _server_api() -> type[ServerAPI]:
    from chromadb.api import ServerAPI

    return ServerAPI


def _start(directory: Path | None) -> Any:
    """Start a private Chroma system.

    Chroma's client registry is not used: it has one in-memory database per process, and refuses
    settings that differ from those of its first user, which may be our caller.
    """
    from chromadb.config import Settings, System

    system = System(
        Settings(
            anonymized_telemetry=False,
            is_persistent=directory is not None,
            persist_directory=str(directory or ""),
        )
    )
    system.instance(_server_api())
    system.start()
    return system

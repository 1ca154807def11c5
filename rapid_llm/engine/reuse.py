"""KV reuse: a prompt is read from where it departs from one that was read before."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rapid_llm.engine.forward import Forward
from rapid_llm.engine.kv_cache import KVCache, Reader, kv_nbytes
from rapid_llm.engine.kv_files import KVFiles, TokenIds, common_prefix
from rapid_llm.errors import InvalidParameterError

WORTH_LOADING = 256
"""Tokens by which a file's prefix must be longer than the one in memory."""

WORTH_SAVING = 1024
"""Prompt tokens that must have been read anew before a file is written."""


@dataclass
class Lease:
    """A cache in use for one prompt.

    Attributes:
        cache: holds the prompt's first ``reused`` tokens; has room for the capacity asked for.
            Read the rest into it, and never roll it back below ``len(prompt) - 1``: another
            lease may be copying what it holds of the prompt.
        tokens: the prompt. Append the answer's tokens, so that the next turn of a conversation
            reuses them. When the lease ends, the cache must hold ``tokens[: cache.length]``: roll
            back what was drafted and not kept *before* appending.
        reused: tokens that need not be read, at most ``len(prompt) - 2``: the logits that follow
            the last one are wanted, and the queries of the one before it.
    """

    cache: KVCache
    tokens: list[int]
    reused: int


@dataclass(eq=False)
class _Entry:
    """A cache and what it holds. While it is busy, ``tokens`` is the prompt it will hold."""

    forward: Forward
    cache: KVCache
    tokens: TokenIds
    busy: bool = True

    def read_by(self, forward: Forward, reader: Reader | None) -> bool:
        """Whether its KV is what a model computes now (see :meth:`Forward.kept_reader`)."""
        return self.forward is forward and reader is not None and self.cache.reader == reader

    def shared(self, tokens: TokenIds) -> int:
        """How many of its first tokens are those of ``tokens``."""
        return common_prefix(self.tokens[: self.cache.length], tokens)

    def same_document(self, shared: int) -> bool:
        """Whether little is lost if this entry keeps only its first ``shared`` tokens.

        Two documents behind one system prompt share less than half, and both are kept.
        """
        return 2 * shared >= len(self.tokens)


class PrefixCache:
    """Keeps the KV of prompts that were read, for prompts that begin with the same tokens.

    Several threads, models and documents share one; the least recently used go first.

    Args:
        budget_bytes: KV kept between generations; a generation that runs has its own memory.
            0 keeps nothing, and a KV larger than the budget is not kept.
        directory: where to keep KV across processes as well; None does not. Files hold the
            prompt's tokens, and there is no limit on them: delete the folder to free the space.

    Raises:
        InvalidParameterError: the budget is negative.
    """

    def __init__(self, budget_bytes: int, directory: Path | None = None) -> None:
        if budget_bytes < 0:
            raise InvalidParameterError(
                f"kv_cache_bytes={budget_bytes} is negative; give at least 0, which keeps nothing"
            )
        self._budget = budget_bytes
        self._files = None if directory is None else KVFiles(directory)
        self._entries: list[_Entry] = []  # least recently used first
        # Reentrant: the garbage collector may close an abandoned stream, and so end its lease,
        # in a thread that is inside the lock.
        self._lock = threading.RLock()

    @property
    def nbytes(self) -> int:
        """Bytes of KV kept between generations, at most the budget."""
        with self._lock:
            return sum(entry.cache.nbytes for entry in self._entries if not entry.busy)

    def clear(self) -> None:
        """Free everything that no generation uses right now. Files stay."""
        with self._lock:
            self._entries = [entry for entry in self._entries if entry.busy]

    def forget(self, forward: Forward) -> None:
        """Free what a model has read that is not used any more."""
        with self._lock:
            self._entries = [e for e in self._entries if e.busy or e.forward is not forward]

    def keep_only(self, forward: Forward, prompt: Sequence[int]) -> int:
        """Free everything that no generation uses, but for what a lease of a prompt would reuse.

        What a later lease finds then depends on this prompt alone, not on what was read after it.
        Returns how many of the prompt's tokens are kept.
        """
        ids = np.asarray(prompt[:-2], dtype=np.int32)
        reader = forward.kept_reader(len(prompt))
        with self._lock:
            idle = [
                entry
                for entry in self._entries
                if not entry.busy and entry.read_by(forward, reader)
            ]
            best = max(idle, key=lambda entry: entry.shared(ids), default=None)
            self._entries = [entry for entry in self._entries if entry.busy or entry is best]
            if best is None:
                return 0
            shared = best.shared(ids)
            best.cache.rollback(shared)
            best.tokens = best.tokens[:shared]
            return shared

    @contextmanager
    def lease(self, forward: Forward, prompt: Sequence[int], capacity: int) -> Iterator[Lease]:
        """A cache that holds the longest prefix of a prompt that was read before.

        When the context ends, in whatever way, what the cache holds is kept for later prompts.

        Args:
            forward: the model that reads the prompt.
            prompt: token ids, at least one.
            capacity: tokens to make room for, at least ``len(prompt)``.

        Raises:
            torch.OutOfMemoryError: no room for a copy, even with all idle KV freed.
        """
        ids = np.asarray(prompt[:-2], dtype=np.int32)
        entry = self._acquire(forward, ids, len(prompt), capacity)
        lease = Lease(entry.cache, list(prompt), entry.cache.length)
        try:
            yield lease
        finally:
            try:
                self._save(entry, lease)
            finally:
                self._release(entry, lease)

    def _acquire(self, forward: Forward, prompt: TokenIds, length: int, capacity: int) -> _Entry:
        try:
            return self._find(forward, prompt, length, capacity)
        except torch.OutOfMemoryError:
            self.clear()
            return self._find(forward, prompt, length, capacity)

    def _find(self, forward: Forward, prompt: TokenIds, length: int, capacity: int) -> _Entry:
        cache = self._from_file(forward, prompt, length, capacity)
        reader = forward.kept_reader(length)
        with self._lock:
            if cache is None:
                cache = self._from_memory(forward, prompt, reader, capacity)
            entry = _Entry(forward, cache, prompt)
            self._entries.append(entry)
            return entry

    def _from_file(
        self, forward: Forward, prompt: TokenIds, length: int, capacity: int
    ) -> KVCache | None:
        """The prefix in a file, if it is much longer than the one in memory.

        Outside the lock, since it takes long: nobody else sees this cache yet.
        """
        if self._files is None:
            return None
        reader = forward.kept_reader(length)
        with self._lock:
            _, held = self._longest(forward, prompt, reader)
        if reader is None or len(prompt) < held + WORTH_LOADING:
            return None
        path, stored = self._files.find(forward, prompt, reader)
        if path is None or stored < held + WORTH_LOADING:
            return None
        self._make_room(_planned(forward, capacity))
        return self._files.load(path, forward, reader, stored, capacity)

    def _from_memory(
        self, forward: Forward, prompt: TokenIds, reader: Reader | None, capacity: int
    ) -> KVCache:
        """The prefix in memory: taken over where nobody loses by it, else copied."""
        entry, shared = self._longest(forward, prompt, reader)
        if entry is None:
            self._make_room(_planned(forward, capacity))
            return forward.new_cache(capacity)
        if entry.busy or not entry.same_document(shared):
            self._make_room(_planned(forward, capacity))
            # Under the lock: the owner could otherwise give it back, and a third take it over.
            return entry.cache.copy_prefix(shared, capacity)
        self._forget(entry)
        entry.cache.rollback(shared)
        if entry.cache.capacity < capacity:
            self._make_room(_planned(forward, capacity))
            entry.cache.grow(capacity)
        return entry.cache

    def _longest(
        self, forward: Forward, prompt: TokenIds, reader: Reader | None
    ) -> tuple[_Entry | None, int]:
        """The entry that shares most tokens with a prompt, the latest of equals; how many."""
        best, most = None, 0
        for entry in reversed(self._entries):
            if entry.read_by(forward, reader):
                shared = entry.shared(prompt)
                if shared > most:
                    best, most = entry, shared
        return best, most

    def _save(self, entry: _Entry, lease: Lease) -> None:
        """Write the prompt's KV to a file, unless it was mostly reused or not read to its end."""
        # The entry is still busy here, so that nobody rolls it back.
        read = len(entry.tokens)
        if (
            self._files is not None
            and read - lease.reused >= WORTH_SAVING
            and lease.cache.length >= read
            and entry.read_by(entry.forward, entry.forward.kept_reader(lease.cache.length))
        ):
            self._files.save(entry.forward, entry.tokens, lease.cache)

    def _release(self, entry: _Entry, lease: Lease) -> None:
        """Keep what the cache holds, in place of earlier states of the same document."""
        with self._lock:
            self._forget(entry)
            held = min(lease.cache.length, len(lease.tokens))
            nbytes = lease.cache.nbytes
            if held == 0 or nbytes > self._budget or not entry.forward.state.traceable:
                return
            entry.tokens = np.asarray(lease.tokens[:held], dtype=np.int32)
            entry.busy = False
            for other in list(self._entries):
                if (
                    other.read_by(entry.forward, entry.cache.reader)
                    and not other.busy
                    and other.same_document(other.shared(entry.tokens))
                ):
                    self._forget(other)
            self._make_room(nbytes)
            self._entries.append(entry)

    def _make_room(self, nbytes: int) -> None:
        """Drop idle entries, the least recently used first, until so many more bytes fit."""
        if nbytes > self._budget:
            return  # it will not be kept, so nothing has to go for it
        with self._lock:
            for entry in list(self._entries):
                if self.nbytes + nbytes <= self._budget:
                    break
                if not entry.busy:
                    self._forget(entry)

    def _forget(self, entry: _Entry) -> None:
        self._entries = [other for other in self._entries if other is not entry]


def _planned(forward: Forward, capacity: int) -> int:
    return kv_nbytes(forward.config, forward.model.dtype, capacity)

"""KV reuse: a prompt is read from the pass on that departs from those of one read before.

Only what the prompt's own prefill would have read by the same passes is reused, see
:mod:`rapid_llm.engine.chunks`, never what decoding read: an answer. So every answer is that of a
fresh prefill, bit for bit.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from rapid_llm.engine.chunks import common_end, pass_ends
from rapid_llm.engine.kv_cache import KVCache, KVOrigin, kv_nbytes
from rapid_llm.engine.kv_files import KVFiles, TokenIds, common_prefix
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.rounding import rounding
from rapid_llm.errors import InvalidParameterError

WORTH_LOADING = 256
"""Tokens by which a file's prefix must be longer than the one in memory."""

WORTH_SAVING = 1024
"""Prompt tokens that must have been read anew before a file is written."""


@dataclass(frozen=True)
class Lease:
    """A cache in use for one prompt.

    Attributes:
        cache: holds the prompt's first ``reused`` tokens; has room for the capacity asked for.
            Read the rest of ``prompt[:-1]`` into it by :meth:`Session.prefill`, and change none of
            these but the last: another lease may be copying them.
        reused: tokens that need not be read: at most ``len(prompt) - 1``, as the logits that follow
            the last token are wanted.
    """

    cache: KVCache
    reused: int


class _Reading(NamedTuple):
    """What is to read a prompt: a model as it is now, with passes that round as they do now.

    ``origin`` is None where what it reads must not be kept.
    """

    runner: ModelRunner
    origin: KVOrigin | None
    rounding: str

    @classmethod
    def now(cls, runner: ModelRunner, length: int) -> _Reading:
        """Of a sequence of so many tokens."""
        return cls(runner, runner.kept_origin(length), rounding(runner))


@dataclass(eq=False)
class _Entry:
    """A cache, and of which tokens it holds the KV, or will: those that a prefill reads.

    The prefill's passes end at ``ends``; what of it was not done, or is not wanted, is not among
    the tokens of an idle entry.
    """

    runner: ModelRunner
    rounding: str
    cache: KVCache
    tokens: TokenIds
    ends: Sequence[int]
    busy: bool = True
    nbytes: int = 0  # once it is idle

    def read_as(self, reading: _Reading) -> bool:
        """Whether its KV is, bit for bit, what would be read now."""
        return (
            self.runner is reading.runner
            and self.rounding == reading.rounding
            and self.cache.origin == reading.origin is not None
        )

    def held(self) -> int:
        """How many of the tokens were read."""
        return min(len(self.tokens), self.cache.length)

    def shared(self, tokens: TokenIds, ends: Sequence[int]) -> int:
        """How many of these a prefill of ``tokens`` in passes that end there would read alike."""
        # While it is in use, a drafter may read the last token again.
        settled = min(self.held(), len(self.tokens) - self.busy)
        return common_end(self.ends, ends, common_prefix(self.tokens[:settled], tokens))

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
            0 keeps nothing, and shares nothing between generations that run side by side; a KV
            larger than the budget is not kept.
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
            return sum(entry.nbytes for entry in self._entries if not entry.busy)

    def clear(self) -> None:
        """Free everything that no generation uses right now. Files stay."""
        with self._lock:
            self._entries = [entry for entry in self._entries if entry.busy]

    def forget(self, runner: ModelRunner) -> None:
        """Free what a model has read that is not used any more."""
        with self._lock:
            self._entries = [e for e in self._entries if e.busy or e.runner is not runner]

    def keep_only(self, runner: ModelRunner, prompt: Sequence[int]) -> int:
        """Free everything that no generation uses, but for what a lease of a prompt would reuse.

        What a later lease finds then depends on this prompt alone, not on what was read after it.
        Returns how many of the prompt's tokens are kept.
        """
        reading, ids = _Reading.now(runner, len(prompt)), _token_ids(prompt[:-1])
        ends = pass_ends(len(ids), runner.prefill_sizes)
        with self._lock:
            idle = [entry for entry in self._entries if not entry.busy and entry.read_as(reading)]
            best = max(idle, key=lambda entry: entry.shared(ids, ends), default=None)
            self._entries = [entry for entry in self._entries if entry.busy or entry is best]
            if best is None:
                return 0
            shared = best.shared(ids, ends)
            best.tokens = best.tokens[:shared]
            return shared

    @contextmanager
    def lease(self, runner: ModelRunner, prompt: Sequence[int], capacity: int) -> Iterator[Lease]:
        """A cache that holds the longest prefix of a prompt that was read before.

        When the context ends, in whatever way, what was read of the prompt is kept for later ones.

        Args:
            runner: the model that reads the prompt.
            prompt: token ids, at least one.
            capacity: tokens to make room for, at least ``len(prompt)``.

        Raises:
            torch.OutOfMemoryError: no room for a copy, even with all idle KV freed.
        """
        entry = self._acquire(runner, _token_ids(prompt), capacity)
        reused = entry.cache.length
        try:
            yield Lease(entry.cache, reused)
        finally:
            try:
                self._save(entry, reused)
            finally:
                self._release(entry)

    def _acquire(self, runner: ModelRunner, prompt: TokenIds, capacity: int) -> _Entry:
        try:
            return self._find(runner, prompt, capacity)
        except torch.OutOfMemoryError:
            self.clear()
            return self._find(runner, prompt, capacity)

    def _find(self, runner: ModelRunner, prompt: TokenIds, capacity: int) -> _Entry:
        cache = self._from_file(runner, prompt, capacity)
        reading = _Reading.now(runner, len(prompt))  # a file tells whether the model has changed
        with self._lock:
            if cache is None:
                cache = self._from_memory(reading, prompt[:-1], capacity)
            ends = pass_ends(len(prompt) - 1, runner.prefill_sizes)
            entry = _Entry(runner, reading.rounding, cache, prompt[:-1], ends)
            if self._budget > 0:
                self._entries.append(entry)
            return entry

    def _from_file(self, runner: ModelRunner, prompt: TokenIds, capacity: int) -> KVCache | None:
        """The prefix in a file, if it is much longer than the one in memory.

        Outside the lock, since it takes long: nobody else sees this cache yet.
        """
        if self._files is None:
            return None
        reading, wanted = _Reading.now(runner, len(prompt)), prompt[:-1]
        origin = reading.origin
        with self._lock:
            _, held = self._longest(reading, wanted)
        if origin is None or len(wanted) < held + WORTH_LOADING:
            return None
        path, stored = self._files.find(runner, wanted, origin)
        if path is None or stored < held + WORTH_LOADING:
            return None
        self._make_room(_planned(runner, capacity))
        return self._files.load(path, runner, origin, stored, capacity)

    def _from_memory(self, reading: _Reading, prompt: TokenIds, capacity: int) -> KVCache:
        """The prefix in memory: taken over where nobody loses by it, else copied."""
        entry, shared = self._longest(reading, prompt)
        planned = _planned(reading.runner, capacity)
        if entry is None:
            self._make_room(planned)
            return reading.runner.new_cache(capacity)
        if entry.busy or not entry.same_document(shared):
            self._make_room(planned)
            # Under the lock: the owner could otherwise give it back, and a third take it over.
            return entry.cache.copy_prefix(shared, capacity)
        self._forget(entry)
        entry.cache.rollback(shared)
        if entry.cache.capacity < capacity:
            self._make_room(planned)
            entry.cache.grow(capacity)
        return entry.cache

    def _longest(self, reading: _Reading, prompt: TokenIds) -> tuple[_Entry | None, int]:
        """The entry that shares most tokens with a prompt, the latest of equals; how many."""
        best, most = None, 0
        ends = pass_ends(len(prompt), reading.runner.prefill_sizes)
        for entry in reversed(self._entries):
            if entry.read_as(reading):
                shared = entry.shared(prompt, ends)
                if shared > most:
                    best, most = entry, shared
        return best, most

    def _save(self, entry: _Entry, reused: int) -> None:
        """Write the prompt's KV to a file, unless it was mostly reused or not read to its end."""
        # The entry is still busy here, so that nobody rolls it back.
        tokens = len(entry.tokens)
        if (
            self._files is not None
            and tokens - reused >= WORTH_SAVING
            and entry.held() == tokens
            and entry.read_as(_Reading.now(entry.runner, entry.cache.length))
        ):
            self._files.save(entry.runner, entry.tokens, entry.cache)

    def _release(self, entry: _Entry) -> None:
        """Keep what was read of a prompt, in place of earlier states of the same document."""
        with self._lock:
            self._forget(entry)
            held, nbytes = entry.held(), entry.cache.nbytes
            if held == 0 or nbytes > self._budget or not entry.runner.state.traceable:
                return
            entry.tokens, entry.nbytes, entry.busy = entry.tokens[:held], nbytes, False
            as_this = _Reading(entry.runner, entry.cache.origin, entry.rounding)
            for other in list(self._entries):
                if (
                    other.read_as(as_this)
                    and not other.busy
                    and other.same_document(other.shared(entry.tokens, entry.ends))
                ):
                    self._forget(other)
            self._make_room(nbytes)
            self._entries.append(entry)

    def _make_room(self, nbytes: int) -> None:
        """Drop idle entries, the least recently used first, until so many more bytes fit."""
        if nbytes > self._budget:
            return  # it will not be kept, so nothing has to go for it
        with self._lock:
            kept = self.nbytes
            for entry in list(self._entries):
                if kept + nbytes <= self._budget:
                    break
                if not entry.busy:
                    kept -= entry.nbytes
                    self._forget(entry)

    def _forget(self, entry: _Entry) -> None:
        if entry in self._entries:
            self._entries.remove(entry)


def _token_ids(tokens: Sequence[int]) -> TokenIds:
    return np.asarray(tokens, dtype=np.int32)


def _planned(runner: ModelRunner, capacity: int) -> int:
    return kv_nbytes(runner.config, runner.model.dtype, capacity)

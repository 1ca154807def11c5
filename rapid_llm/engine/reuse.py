"""Prefix cache: keep the KV of prompts, and reuse it for prompts that begin the same.

Only KV that the prompt's own prefill would compute by the same passes is reused, see
:mod:`rapid_llm.engine.chunks`, and never KV of answers. So an answer with reuse equals that of a
fresh prefill, bit for bit.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rapid_llm.engine.chunks import common_end, pass_ends
from rapid_llm.engine.kv_cache import KVCache, KVOrigin, kv_nbytes
from rapid_llm.engine.kv_files import KVFiles, TokenIds, common_prefix
from rapid_llm.engine.memory import with_memory
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.rounding import rounding
from rapid_llm.errors import InvalidParameterError

WORTH_LOADING = 256
"""Minimum number of tokens by which a prefix in a file must exceed the one in memory."""

WORTH_SAVING = 1024
"""Minimum number of newly read prompt tokens for which a file is written."""


@dataclass(frozen=True)
class Lease:
    """A cache in use for one prompt.

    Attributes:
        cache: KV cache with the prompt's first ``reused`` tokens and the requested capacity. The
            rest of ``prompt[:-1]`` is read into it by :meth:`Session.prefill`. Of these tokens only
            the last may be changed later, because another lease may be copying them.
        reused: number of tokens that need not be read, at most ``len(prompt) - 1``, because the
            last token must be read for its logits.
    """

    cache: KVCache
    reused: int


class _ReaderState(NamedTuple):
    """Everything about a model that its KV depends on.

    Attributes:
        runner: the model.
        origin: state of the model; None where its KV must not be kept.
        rounding: description of the rounding of its passes.
    """

    runner: ModelRunner
    origin: KVOrigin | None
    rounding: str

    @classmethod
    def now(cls, runner: ModelRunner, length: int) -> _ReaderState:
        """The current state, for a sequence of ``length`` tokens."""
        return cls(runner, runner.kept_origin(length), rounding(runner))


@dataclass(eq=False)
class _Entry:
    """A cache and the tokens of its prefill.

    Attributes:
        runner: model that computed the KV.
        rounding: description of the rounding of its passes.
        cache: KV cache.
        tokens: tokens of the prefill; in an idle entry only those that were read and are kept.
        ends: end positions of the passes of the prefill.
        busy: whether a lease uses it.
        nbytes: bytes of the cache; 0 while busy.
    """

    runner: ModelRunner
    rounding: str
    cache: KVCache
    tokens: TokenIds
    ends: Sequence[int]
    busy: bool = True
    nbytes: int = 0

    def read_by(self, reader: _ReaderState) -> bool:
        """Whether a model in this state would compute the same KV, bit for bit."""
        return (
            self.runner is reader.runner
            and self.rounding == reader.rounding
            and self.cache.origin == reader.origin is not None
        )

    def held(self) -> int:
        """Number of its tokens that were read."""
        return min(len(self.tokens), self.cache.length)

    def shared(self, tokens: TokenIds, ends: Sequence[int]) -> int:
        """Number of its first tokens whose KV another prefill can reuse.

        Args:
            tokens: tokens of the other prefill.
            ends: end positions of its passes.
        """
        # While the entry is busy, a drafter may read its last token again.
        settled = min(self.held(), len(self.tokens) - self.busy)
        return common_end(self.ends, ends, common_prefix(self.tokens[:settled], tokens))

    def same_document(self, shared: int) -> bool:
        """Whether a prompt that shares this many tokens is taken to be on the same document.

        The entry then keeps only the shared tokens. Two documents after one system prompt share
        less than half, and both are kept.
        """
        return 2 * shared >= len(self.tokens)


class PrefixCache:
    """Keeps the KV of prompts, for later prompts that begin with the same tokens.

    Threads, models and documents share one cache; the least recently used entries are evicted.

    Args:
        budget_bytes: maximum bytes of KV kept between generations, without the memory of running
            generations. KV larger than the budget is not kept. 0 keeps nothing, and shares nothing
            between concurrent generations.
        directory: folder for KV that is kept across processes; None for none. Files contain the
            prompt's tokens, and their total size is not limited: delete the folder to free space.

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
        # Reentrant, because the garbage collector may close an abandoned stream, and so end its
        # lease, in a thread that has the lock.
        self._lock = threading.RLock()

    @property
    def nbytes(self) -> int:
        """Bytes of kept KV, without that of running generations; at most the budget."""
        with self._lock:
            return sum(entry.nbytes for entry in self._entries if not entry.busy)

    def clear(self) -> None:
        """Free all KV that no generation uses right now; files stay."""
        with self._lock:
            self._entries = [entry for entry in self._entries if entry.busy]

    def forget(self, runner: ModelRunner) -> None:
        """Free all KV of a model that no generation uses right now."""
        with self._lock:
            self._entries = [e for e in self._entries if e.busy or e.runner is not runner]

    def keep_only(self, runner: ModelRunner, prompt: Sequence[int]) -> int:
        """Free all KV that no generation uses, except what a lease of one prompt would reuse.

        Args:
            runner: model that read the prompt.
            prompt: token ids of the prompt.

        Returns:
            Number of the prompt's tokens whose KV is kept.
        """
        reader, ids = _ReaderState.now(runner, len(prompt)), _token_ids(prompt[:-1])
        ends = pass_ends(len(ids), runner.prefill_sizes)
        with self._lock:
            idle = [entry for entry in self._entries if not entry.busy and entry.read_by(reader)]
            best = max(idle, key=lambda entry: entry.shared(ids, ends), default=None)
            self._entries = [entry for entry in self._entries if entry.busy or entry is best]
            if best is None:
                return 0
            shared = best.shared(ids, ends)
            best.tokens = best.tokens[:shared]
            return shared

    @contextmanager
    def lease(self, runner: ModelRunner, prompt: Sequence[int], capacity: int) -> Iterator[Lease]:
        """Lease a cache with the longest kept prefix of a prompt.

        When the context ends, also by an error, the part of the prompt that was read is kept for
        later prompts.

        Args:
            runner: model that reads the prompt.
            prompt: token ids of the prompt, at least one.
            capacity: capacity of the cache in tokens, at least ``len(prompt)``.

        Raises:
            torch.OutOfMemoryError: no memory for a copy, even after all idle KV was freed.
        """
        find = partial(self._find, runner, _token_ids(prompt), capacity)
        entry = with_memory(find, self.clear)
        reused = entry.cache.length
        try:
            yield Lease(entry.cache, reused)
        finally:
            try:
                self._save(entry, reused)
            finally:
                self._release(entry)

    def _find(self, runner: ModelRunner, prompt: TokenIds, capacity: int) -> _Entry:
        cache = self._from_file(runner, prompt, capacity)
        # After the look for a file, which can detect that the model has changed.
        reader = _ReaderState.now(runner, len(prompt))
        with self._lock:
            if cache is None:
                cache = self._from_memory(reader, prompt[:-1], capacity)
            ends = pass_ends(len(prompt) - 1, runner.prefill_sizes)
            entry = _Entry(runner, reader.rounding, cache, prompt[:-1], ends)
            if self._budget > 0:
                self._entries.append(entry)
            return entry

    def _from_file(self, runner: ModelRunner, prompt: TokenIds, capacity: int) -> KVCache | None:
        """Load the prefix in a file, if it is much longer than the one in memory.

        It runs outside the lock because it takes long; no other thread sees this cache yet.
        """
        if self._files is None:
            return None
        reader, wanted = _ReaderState.now(runner, len(prompt)), prompt[:-1]
        origin = reader.origin
        with self._lock:
            _, held = self._longest(reader, wanted)
        if origin is None or len(wanted) < held + WORTH_LOADING:
            return None
        path, stored = self._files.find(runner, wanted, origin)
        if path is None or stored < held + WORTH_LOADING:
            return None
        self._make_room(_planned(runner, capacity))
        return self._files.load(path, runner, origin, stored, capacity)

    def _from_memory(self, reader: _ReaderState, prompt: TokenIds, capacity: int) -> KVCache:
        """Take over the cache of an idle entry on the same document, or copy the shared prefix."""
        entry, shared = self._longest(reader, prompt)
        planned = _planned(reader.runner, capacity)
        if entry is None:
            self._make_room(planned)
            return reader.runner.new_cache(capacity)
        if entry.busy or not entry.same_document(shared):
            self._make_room(planned)
            # Under the lock, or its owner could release it, and another thread take it over.
            return entry.cache.copy_prefix(shared, capacity)
        self._forget(entry)
        entry.cache.rollback(shared)
        if entry.cache.capacity < capacity:
            self._make_room(planned)
            entry.cache.grow(capacity)
        return entry.cache

    def _longest(self, reader: _ReaderState, prompt: TokenIds) -> tuple[_Entry | None, int]:
        """The entry with the longest reusable prefix, the latest of equals, and its length."""
        best, most = None, 0
        ends = pass_ends(len(prompt), reader.runner.prefill_sizes)
        for entry in reversed(self._entries):
            if entry.read_by(reader):
                shared = entry.shared(prompt, ends)
                if shared > most:
                    best, most = entry, shared
        return best, most

    def _save(self, entry: _Entry, reused: int) -> None:
        """Write the prompt's KV to a file, unless it was mostly reused or not read to its end."""
        # The entry is still busy, so that no other thread rolls it back.
        tokens = len(entry.tokens)
        if (
            self._files is not None
            and tokens - reused >= WORTH_SAVING
            and entry.held() == tokens
            and entry.read_by(_ReaderState.now(entry.runner, entry.cache.length))
        ):
            self._files.save(entry.runner, entry.tokens, entry.cache)

    def _release(self, entry: _Entry) -> None:
        """Keep the KV of a prompt, and drop earlier entries on the same document."""
        with self._lock:
            self._forget(entry)
            held, nbytes = entry.held(), entry.cache.nbytes
            if held == 0 or nbytes > self._budget or not entry.runner.state.traceable:
                return
            entry.tokens, entry.nbytes, entry.busy = entry.tokens[:held], nbytes, False
            as_this = _ReaderState(entry.runner, entry.cache.origin, entry.rounding)
            for other in list(self._entries):
                if (
                    other.read_by(as_this)
                    and not other.busy
                    and other.same_document(other.shared(entry.tokens, entry.ends))
                ):
                    self._forget(other)
            self._make_room(nbytes)
            self._entries.append(entry)

    def _make_room(self, nbytes: int) -> None:
        """Evict idle entries, the least recently used first, until ``nbytes`` more bytes fit."""
        if nbytes > self._budget:
            return  # it will not be kept, so nothing has to be evicted for it
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

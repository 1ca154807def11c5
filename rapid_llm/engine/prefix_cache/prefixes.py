"""Prefix cache: keep the KV of prompts, and reuse it for prompts that begin the same.

Only KV that the prompt's own prefill would compute by the same passes is reused, see
:mod:`rapid_llm.engine.chunks`, and never KV of answers. So an answer with reuse equals that of a
fresh prefill, bit for bit.

KV evicted from a device with memory of its own moves to the host's memory; long prompts are also
written to files. A prompt takes its prefix from the device, extends it from the host if the host
has more, or loads a file that has much more than both.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rapid_llm.engine.kv_cache import KVCache, kv_nbytes
from rapid_llm.engine.memory import with_memory
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.prefix_cache.chain import PassChain
from rapid_llm.engine.prefix_cache.files import KVFiles
from rapid_llm.engine.prefix_cache.host import DevicePrefix, HostPrefix, HostTier
from rapid_llm.engine.prefix_cache.reading import Lease, Prefill, Reading, prefill_of
from rapid_llm.engine.prefix_cache.tiers import PrefixTier, ReaderState, Tier
from rapid_llm.errors import InvalidParameterError

WORTH_LOADING = 256
"""Minimum number of tokens by which a prefix in a file must exceed the one in memory."""

WORTH_SAVING = 1024
"""Minimum number of newly read prompt tokens for which a file is written."""


class PrefixCache:
    """Keeps the KV of prompts, for later prompts that begin with the same tokens.

    Threads, models and documents share one cache; in each tier the least recently used prefixes
    leave first.

    Args:
        budget_bytes: maximum bytes of KV kept on devices between generations, without the memory of
            running generations. KV larger than the budget is not kept there.
        directory: folder for KV that is kept across processes; None for none. Files contain the
            prompt's tokens.
        host_bytes: maximum bytes of KV kept in host memory, of devices that do not share it. With
            both budgets at 0 nothing is kept in memory, nor shared but by joined generations.
        directory_bytes: maximum bytes of all files, see :class:`.folder.Folder`.

    Raises:
        InvalidParameterError: a budget is negative, or the folder's has no folder.
    """

    def __init__(
        self,
        budget_bytes: int,
        directory: Path | None = None,
        *,
        host_bytes: int = 0,
        directory_bytes: int | None = None,
    ) -> None:
        for name, budget in (
            ("kv_cache_bytes", budget_bytes),
            ("kv_cache_host_bytes", host_bytes),
            ("kv_cache_dir_bytes", directory_bytes),
        ):
            if budget is not None and budget < 0:
                raise InvalidParameterError(
                    f"{name}={budget} is negative; give at least 0, which keeps nothing"
                )
        require_folder_for_limit(directory, directory_bytes)
        self._files = None if directory is None else KVFiles(directory, directory_bytes)
        self._device: PrefixTier[DevicePrefix] = PrefixTier(budget_bytes)
        self._host = HostTier(host_bytes)
        self._reading: list[Reading] = []
        # Reentrant, because the garbage collector may close an abandoned stream, and so end its
        # lease, in a thread that has the lock.
        self._lock = threading.RLock()

    @property
    def nbytes(self) -> int:
        """Bytes of KV kept on devices, without that of running generations."""
        return self._device.nbytes

    @property
    def host_nbytes(self) -> int:
        """Bytes of KV kept in host memory."""
        return self._host.nbytes

    @property
    def disk_nbytes(self) -> int:
        """Bytes of the folder's files."""
        return 0 if self._files is None else self._files.nbytes

    def clear(self) -> None:
        """Free all KV that no generation uses right now; files stay."""
        self._drop(None)

    def forget(self, runner: ModelRunner) -> None:
        """Free all KV of a model that no generation uses right now."""
        self._drop(runner)

    def free_devices(self) -> None:
        """Free the devices of all KV that no generation uses right now; it goes to the host."""
        with self._lock:
            for prefix in self._device:
                self._device.discard(prefix)
                self._host.take(prefix)
        self._host.wait()

    def keep_only(self, runner: ModelRunner, prompt: Sequence[int]) -> int:
        """Free all KV that no generation uses, except what a lease of one prompt would reuse.

        Args:
            runner: model that read the prompt.
            prompt: token ids of the prompt.

        Returns:
            Number of the prompt's tokens whose KV is kept.
        """
        _, chain = prefill_of(runner, prompt)
        state = ReaderState.now(runner, len(prompt))
        with self._lock:
            best, shared = self._device.longest(state, chain)
            further, more = self._host.longest(state, chain)
            self._drop(None, best, further if more > shared else None)
            if best is not None:  # cut off what follows the shared tokens
                self._device.discard(best)
                best.cache.rollback(max(shared, best.cache.lent))
                self._device.add(DevicePrefix(state, chain.up_to(shared), best.cache))
            return max(shared, more)

    @contextmanager
    def lease(
        self, runner: ModelRunner, prompt: Sequence[int], capacity: int, *, share: bool = False
    ) -> Iterator[Lease]:
        """Lease a cache with the longest kept prefix of a prompt.

        When the context ends, also by an error, the part of the prompt that was read is kept for
        later prompts.

        Args:
            runner: model that reads the prompt.
            prompt: token ids of the prompt, at least one.
            capacity: capacity of the cache in tokens, at least ``len(prompt)``.
            share: whether the cache may borrow most of the prompt from another that stays in use,
                see :class:`rapid_llm.engine.kv_cache.KVCache`. What such a cache adds is not kept.

        Raises:
            torch.OutOfMemoryError: no memory for a copy, even after all idle KV was freed.
        """
        acquire = partial(self._acquire, runner, prefill_of(runner, prompt), capacity, share)
        reading, origins = with_memory(acquire, self.free_devices)
        lease = Lease(reading.cache, origins)
        try:
            yield lease
        finally:
            try:
                self._save(reading, lease.reused)
            finally:
                self._release(reading)

    def will_lend(self, runner: ModelRunner, prefill: Prefill) -> bool:
        """Whether a running prefill has yet to read most of a prompt, which can then be borrowed.

        Args:
            runner: model that reads the prompt.
            prefill: its prefill.
        """
        state = ReaderState.now(runner, len(prefill.tokens) + 1)
        with self._lock:
            best = max((each.will_lend(runner, prefill) for each in self._reading), default=0)
            kept = self._device.longest(state, prefill.chain)[1]
            now = max(kept, self._lender(state, prefill)[1])
        return best > now and _is_most(best, prefill.chain)

    def _acquire(
        self,
        runner: ModelRunner,
        prefill: Prefill,
        capacity: int,
        share: bool,
    ) -> tuple[Reading, Mapping[Tier, int]]:
        tokens, chain = prefill
        if share:
            # Before the lock, as it waits for a pass that another thread runs, in which the garbage
            # collector may end a lease.
            state = ReaderState.now(runner, len(tokens) + 1)
            with self._lock:
                reading = self._borrowed(state, prefill, capacity)
            if reading is not None:
                return reading, {"device": reading.cache.length, "host": 0}
        capacity = runner.capacity_for(capacity)
        loaded = self._from_file(runner, prefill, capacity)
        # After the search for a file, which can detect that the model has changed.
        state = ReaderState.now(runner, len(tokens) + 1)
        if loaded is not None:
            reading = Reading(runner, state.rounding, loaded, tokens, chain)
            origins: dict[Tier, int] = {"disk": loaded.length}
        else:
            with self._lock:
                # The host first: a prefix evicted for this prompt may evict that one there.
                further, shared = self._host.longest(state, chain)
                cache = self._from_device(state, prefill, capacity)
            reading = Reading(runner, state.rounding, cache, tokens, chain)
            origins = {"device": cache.length, "host": 0}
            # Outside the lock, because it takes long.
            if further is not None and shared > cache.length and further.copied.result():
                further.append_to(cache, shared)
                cache.origin = state.origin
                origins["host"] = shared - origins["device"]
        with self._lock:
            if self._device.budget or self._host.budget or share:
                self._reading.append(reading)
        return reading, origins

    def _borrowed(self, state: ReaderState, prefill: Prefill, capacity: int) -> Reading | None:
        """A cache that borrows most of a prompt; None where no other holds so much of it."""
        chain = prefill.chain
        idle, kept = self._device.longest(state, chain)
        reading, read = self._lender(state, prefill)
        shared = max(kept, read)
        if not _is_most(shared, chain) or self._host.longest(state, chain)[1] > shared:
            return None
        exact = shared
        if idle is not None and kept >= read:
            self._device.use(idle)
            source = idle.cache
        else:
            assert reading is not None
            source = reading.cache
            exact = reading.shared(state, prefill)
        self._make_room(_planned(state.runner, capacity - shared))
        cache = source.borrow(shared, capacity)
        borrowed = Reading(state.runner, state.rounding, cache, *prefill, exact)
        self._reading.append(borrowed)
        return borrowed

    def _from_file(self, runner: ModelRunner, prefill: Prefill, capacity: int) -> KVCache | None:
        """Load the prefix in a file, if it is much longer than the one in memory.

        It runs outside the lock because it takes long; no other thread sees this cache yet.
        """
        if self._files is None:
            return None
        chain = prefill.chain
        state = ReaderState.now(runner, len(prefill.tokens) + 1)
        with self._lock:
            kept = self._device.longest(state, chain), self._host.longest(state, chain)
            held = max(shared for _, shared in (self._most_read(state, prefill), *kept))
        if state.origin is None or chain.tokens < held + WORTH_LOADING:
            return None
        path, stored = self._files.find(runner, chain, state.origin)
        if path is None or stored < held + WORTH_LOADING:
            return None
        self._make_room(_planned(runner, capacity))
        return self._files.load(path, runner, state.origin, stored, capacity)

    def _from_device(self, state: ReaderState, prefill: Prefill, capacity: int) -> KVCache:
        """Take over the cache of an idle prefix of the same document, or copy what is shared."""
        idle, shared = self._device.longest(state, prefill.chain)
        reading, read = self._most_read(state, prefill)
        planned = _planned(state.runner, capacity)
        if reading is not None and read > shared:
            self._make_room(planned)
            # Under the lock, or its owner could release it, and another thread take it over.
            return reading.cache.copy_prefix(read, capacity)
        if idle is None:
            self._make_room(planned)
            return state.runner.new_cache(capacity)
        lent = idle.cache.lent
        # What others borrow stays where it is, as their passes hold its addresses; and a drafter
        # may read the last token of the prefill again.
        kept_for_others = lent > min(shared, len(prefill.tokens) - 1) or (
            lent > 0 and idle.cache.capacity < capacity
        )
        if 2 * shared < idle.chain.tokens or kept_for_others:
            # Another document behind the same system prompt, or one in use: both are kept.
            self._make_room(planned)
            return idle.cache.copy_prefix(shared, capacity)
        self._device.discard(idle)
        idle.cache.rollback(shared)
        if idle.cache.capacity < capacity:
            self._make_room(planned)
            idle.cache.grow(capacity)
        return idle.cache

    def _most_read(self, state: ReaderState, prefill: Prefill) -> tuple[Reading | None, int]:
        """The running prefill whose KV can be reused for the most tokens, bit for bit."""
        return self._latest_best(lambda reading: reading.shared(state, prefill))

    def _lender(self, state: ReaderState, prefill: Prefill) -> tuple[Reading | None, int]:
        """The running prefill from which joined passes can borrow the most tokens."""
        return self._latest_best(lambda reading: reading.lendable(state, prefill))

    def _latest_best(self, tokens: Callable[[Reading], int]) -> tuple[Reading | None, int]:
        """The running prefill that has most of something, the latest of equals, and how much."""
        best, most = None, 0
        for reading in reversed(self._reading):
            if (shared := tokens(reading)) > most:
                best, most = reading, shared
        return best, most

    def _save(self, reading: Reading, reused: int) -> None:
        """Write the prompt's KV to a file, unless it was mostly reused or not read to its end."""
        # Called while the cache is in use, so that no other thread rolls it back.
        tokens, cache = reading.tokens, reading.cache
        if (
            self._files is not None
            and reading.kept is None
            and len(tokens) - reused >= WORTH_SAVING
            and reading.held == len(tokens)
            and cache.origin is not None
            and reading.state == ReaderState.now(reading.runner, cache.length)
        ):
            self._files.save(reading.runner, tokens, reading.chain, cache)

    def _release(self, reading: Reading) -> None:
        """Keep the KV of a prompt, in place of earlier ones on the same document."""
        with self._lock:
            if reading in self._reading:
                self._reading.remove(reading)
            if reading.cache.prefix:
                return
            chain = reading.chain.up_to(reading.exact)
            traceable = reading.cache.origin is not None and reading.runner.state.traceable
            if not chain.ends or not traceable:
                return
            prefix = DevicePrefix(reading.state, chain, reading.cache)
            if prefix.nbytes > self._device.budget:
                self._host.take(prefix)
                return
            for left in self._device.add(prefix):
                self._host.take(left)

    def _make_room(self, nbytes: int) -> None:
        """Move the least recently used prefixes to the host until ``nbytes`` more bytes fit."""
        with self._lock:
            for left in self._device.make_room(nbytes):
                self._host.take(left)

    def _drop(
        self,
        runner: ModelRunner | None,
        kept: DevicePrefix | None = None,
        kept_on_host: HostPrefix | None = None,
    ) -> None:
        """Free the idle KV of a model, or of all, except for two prefixes."""
        with self._lock:
            for prefix in self._device:
                if prefix is not kept and runner in (None, prefix.state.runner):
                    self._device.discard(prefix)
            self._host.drop(runner, kept_on_host)


def require_folder_for_limit(directory: Path | str | None, directory_bytes: int | None) -> None:
    """Refuse a limit in bytes of a folder that is not given.

    Raises:
        InvalidParameterError: there is a limit and no folder.
    """
    if directory is None and directory_bytes is not None:
        raise InvalidParameterError(
            f"kv_cache_dir_bytes={directory_bytes} limits no folder: give kv_cache_dir as well, or "
            "leave it out"
        )


def _is_most(shared: int, chain: PassChain) -> bool:
    """Whether so many of a prefill's first tokens are worth sharing: at least half of them."""
    return shared > 0 and 2 * shared >= chain.tokens


def _planned(runner: ModelRunner, capacity: int) -> int:
    return kv_nbytes(runner.config, runner.model.dtype, capacity) // runner.kv_shares

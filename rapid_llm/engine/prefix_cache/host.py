"""Host tier: KV evicted from a device, in pinned host memory, for later prompts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from rapid_llm.engine.device import device_of
from rapid_llm.engine.kv_cache import KVCache
from rapid_llm.engine.prefix_cache.chain import PassChain
from rapid_llm.engine.prefix_cache.tiers import PrefixTier, ReaderState

COVERED = 0.9
"""Share of a prefix that a farther tier must hold already for the prefix not to be copied there."""

PIECE = 1 << 25
"""Bytes of a host buffer, a power of two: PyTorch rounds the sizes of pinned buffers up to one."""

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class DevicePrefix:
    """KV of a prefix in a cache on its device.

    Attributes:
        state: the model that read it.
        chain: the passes that read it.
        cache: the cache, which begins with it.
        nbytes: bytes of the cache.
    """

    state: ReaderState
    chain: PassChain
    cache: KVCache
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.nbytes = self.cache.nbytes


class _Buffer(NamedTuple):
    """Keys or values of a layer: heads, head size, dtype and device."""

    heads: int
    dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_nbytes(self) -> int:
        """Bytes of a token in one head."""
        return self.dim * self.dtype.itemsize


class HostPrefix:
    """KV of a prefix in buffers of host memory.

    A row for each layer, its keys and then its values, and each head, ``[tokens, dim]``; all rows
    are laid out one after another, over the buffers' borders.

    Args:
        prefix: prefix to copy; tokens of its cache after its last pass are left out.

    Attributes:
        state: the model that read it.
        chain: the passes that read it.
        nbytes: bytes of the buffers.
        copied: outcome of the copy: True when the buffers hold it, False if it failed.
    """

    def __init__(self, prefix: DevicePrefix) -> None:
        self.state, self.chain = prefix.state, prefix.chain
        self._layers = [
            (_shape_of(layer.keys), _shape_of(layer.values)) for layer in prefix.cache.layers
        ]
        per_token = sum(b.heads * b.token_nbytes for pair in self._layers for b in pair)
        whole, rest = divmod(per_token * self.chain.tokens, PIECE)
        self._sizes = [PIECE] * whole + [1 << (rest - 1).bit_length()] * (rest > 0)
        self.nbytes = sum(self._sizes)
        self._pieces: list[Tensor] = []
        self.copied: Future[bool] = Future()

    @property
    def devices(self) -> set[torch.device]:
        """Devices that the prefix comes from."""
        return {buffer.device for pair in self._layers for buffer in pair}

    def fill(self, cache: KVCache, queued: dict[torch.device, object]) -> bool:
        """Copy the prefix to the host; returns whether there was memory for it.

        Args:
            cache: the cache with the prefix.
            queued: work that must end before the copy, by device of the cache.
        """
        try:
            (first, *_) = queued
            self._pieces = [device_of(first).host_buffer(size) for size in self._sizes]
            for place, after in queued.items():
                pairs = list(self._pairs(cache, 0, self.chain.tokens, place))
                device_of(place).transfer(pairs, place, after)
        except (RuntimeError, MemoryError) as error:  # CUDA's errors are RuntimeErrors
            self._pieces = []
            _log.warning(
                "the KV of %d tokens could not be moved to the host's memory, and will be read "
                "again: %s; lower kv_cache_host_bytes",
                self.chain.tokens,
                error,
            )
            return False
        return True

    @torch.inference_mode()  # the cache may have been made so
    def append_to(self, cache: KVCache, length: int) -> None:
        """Copy the tokens up to ``length`` that a cache lacks, and wait for the copy.

        Args:
            cache: cache of the same model with fewer tokens, all of this prefix.
            length: number of tokens of the cache afterwards.
        """
        for layer, shapes in zip(cache.layers, self._layers, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(*map(_empty, shapes))
        start = cache.length
        for place in self.devices:
            device = device_of(place)
            pairs = [(host, own) for own, host in self._pairs(cache, start, length, place)]
            device.transfer(pairs, place, device.queued(place))
        cache.advance(length - start)

    def _pairs(
        self, cache: KVCache, start: int, stop: int, place: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of the bytes of tokens ``start`` to ``stop``: on a device, and in the buffers."""
        offset = 0
        for layer, shapes in zip(cache.layers, self._layers, strict=True):
            for tensor, shape in zip((layer.keys, layer.values), shapes, strict=True):
                for head in tensor[0]:
                    if shape.device == place:
                        row = head[start:stop].reshape(-1).view(torch.uint8)
                        yield from self._split(row, offset + start * shape.token_nbytes)
                    offset += self.chain.tokens * shape.token_nbytes

    def _split(self, row: Tensor, offset: int) -> Iterator[tuple[Tensor, Tensor]]:
        done = 0
        while done < len(row):
            piece, at = divmod(offset + done, PIECE)
            part = min(len(row) - done, PIECE - at)
            yield row[done : done + part], self._pieces[piece][at : at + part]
            done += part


class HostTier:
    """Prefixes in host memory, within a budget; not safe to use from several threads at once.

    Copies to the host are made by a thread, beside the devices' other work.

    Args:
        budget: maximum number of bytes.
    """

    def __init__(self, budget: int) -> None:
        self._tier: PrefixTier[HostPrefix] = PrefixTier(budget)
        self._worker: ThreadPoolExecutor | None = None
        self._copying: set[Future[bool]] = set()

    @property
    def budget(self) -> int:
        """Maximum number of bytes."""
        return self._tier.budget

    @property
    def nbytes(self) -> int:
        """Bytes of all prefixes, at most the budget."""
        return self._tier.nbytes

    def take(self, prefix: DevicePrefix) -> None:
        """Begin to copy a prefix evicted from its device, unless most of it is here already.

        Its cache must not be used any more. Prefixes on devices that share the host's memory are
        not copied.
        """
        if not all(device_of(layer.keys.device).own_memory for layer in prefix.cache.layers):
            return
        here, shared = self._tier.longest(prefix.state, prefix.chain)
        if here is not None and shared >= COVERED * prefix.chain.tokens:
            self._tier.use(here)
            return
        kept = HostPrefix(prefix)
        if kept.nbytes > self._tier.budget:
            return
        queued = {place: device_of(place).queued(place) for place in kept.devices}
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="rapid-llm-kept-kv")
        try:
            kept.copied = self._worker.submit(kept.fill, prefix.cache, queued)
        except RuntimeError:  # the interpreter is shutting down
            return
        self._copying.add(kept.copied)
        kept.copied.add_done_callback(self._copying.discard)
        self._tier.add(kept)

    def longest(self, state: ReaderState, chain: PassChain) -> tuple[HostPrefix | None, int]:
        """The prefix that shares the most tokens with a prefill, and their number."""
        prefix, shared = self._tier.longest(state, chain)
        while prefix is not None and prefix.copied.done() and not prefix.copied.result():
            self._tier.discard(prefix)
            prefix, shared = self._tier.longest(state, chain)
        if prefix is not None:
            self._tier.use(prefix)
        return prefix, shared

    def wait(self) -> None:
        """Wait until all copies to the host have ended."""
        wait(list(self._copying))

    def drop(self, runner: object = None, keep: HostPrefix | None = None) -> None:
        """Free the prefixes of one model (None: of all) except one prefix."""
        for place in self._discarded(runner, keep):
            device_of(place).free_host_buffers()

    def _discarded(self, runner: object, keep: HostPrefix | None) -> set[torch.device]:
        """Discard prefixes; returns the devices that they come from."""
        devices: set[torch.device] = set()
        for prefix in self._tier:
            if prefix is not keep and runner in (None, prefix.state.runner):
                self._tier.discard(prefix)
                devices |= prefix.devices
        return devices


def _shape_of(tensor: Tensor) -> _Buffer:
    return _Buffer(tensor.shape[1], tensor.shape[3], tensor.dtype, tensor.device)


def _empty(shape: _Buffer) -> Tensor:
    return torch.empty((1, shape.heads, 0, shape.dim), dtype=shape.dtype, device=shape.device)

"""Preallocated KV cache: tokens are written in place, and a rollback only sets a length."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import Cache, CacheLayerMixin

_CACHE_NAMES = ("cache", "past_key_values")


class KVOrigin(NamedTuple):
    """The state of a model that keys and values were computed with.

    Attributes:
        number: number of the model's state, :attr:`rapid_llm.engine.model_state.ModelState.number`.
        scale: number of rotary switch lengths that the sequence exceeds, see
            :attr:`rapid_llm.engine.model_runner.ModelRunner.switches`.
    """

    number: int
    scale: int


class PreallocatedLayer(CacheLayerMixin):
    """Keys and values of one layer, ``[1, kv_heads, capacity, dim]``, filled up to ``length``.

    A sliding-window layer keeps the whole sequence too, because a window that has dropped its
    oldest keys could not be rolled back; the attention applies the window.
    """

    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Not in __init__, where the device of this layer is not known yet.
        self.keys = key_states.new_empty(
            1, key_states.shape[1], self.capacity, key_states.shape[-1]
        )
        self.values = value_states.new_empty(
            1, value_states.shape[1], self.capacity, value_states.shape[-1]
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append ``[1, kv_heads, n, dim]`` and return views of all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def first(self, length: int, capacity: int) -> PreallocatedLayer:
        """A copy of the first ``length`` tokens, with buffers for ``capacity`` tokens."""
        copied = PreallocatedLayer(capacity)
        if length > 0:
            copied.update(self.keys[:, :, :length], self.values[:, :, :length])
        return copied

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity


class Segment(NamedTuple):
    """Tokens in another cache's buffers, read and never written by who borrows them.

    Attributes:
        cache: the cache that holds them.
        end: number of its own first tokens that are borrowed.
    """

    cache: KVCache
    end: int


class KVCache(Cache):
    """KV cache of one sequence (batch size 1), with preallocated layers.

    The first tokens may be borrowed from other caches (``prefix``), which then hold them once for
    many sequences; the layers hold the tokens after them. Only passes of
    :mod:`rapid_llm.engine.joined` read such a cache.

    Args:
        num_layers: number of decoder layers.
        capacity: maximum number of tokens, those of the prefix included.
        prefix: segments that the sequence begins with, in order.

    Attributes:
        capacity: maximum number of tokens.
        prefix: segments that the sequence begins with; empty where it borrows nothing.
        prefix_length: number of tokens of the prefix.
        position_offset: number of the sequence's tokens that are left out of the cache; added to
            the positions of new tokens.
        expected: length of the whole sequence while a part of it is read, in tokens; some kinds of
            rotary scaling depend on it. 0 where the next pass ends the sequence.
        origin: state of the model that computed the contents (see ``ModelRunner.origin``); None if
            empty or unknown.
    """

    layers: list[PreallocatedLayer]

    def __init__(self, num_layers: int, capacity: int, prefix: tuple[Segment, ...] = ()) -> None:
        held = sum(segment.end for segment in prefix)
        super().__init__(layers=[PreallocatedLayer(capacity - held) for _ in range(num_layers)])
        self.capacity = capacity
        self.prefix, self.prefix_length = prefix, held
        # Replaced as a whole, as other threads read it; a lock could be waited for by the garbage
        # collector, which ends abandoned streams wherever it runs.
        self._borrowers: tuple[tuple[ReferenceType[KVCache], int], ...] = ()
        self._most_lent = 0  # so far, which tells most rollbacks that they need not look
        self.position_offset = 0
        self.expected = 0
        self.origin: KVOrigin | None = None

    @property
    def length(self) -> int:
        """Number of tokens in all layers; during a pass the first layers have more."""
        return self.prefix_length + min(layer.length for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Allocated bytes, without the prefix: those of
        ``layers * 2 * kv_heads * (capacity - prefix_length) * dim`` numbers."""
        tensors = [t for layer in self.layers for t in (layer.keys, layer.values)]
        return sum(t.nbytes for t in tensors if t is not None)

    @property
    def first_position(self) -> int:
        """Position in the sequence of the first token in the layers."""
        return self.position_offset + self.prefix_length

    def allocate(self) -> None:
        """Allocate buffers like those that it borrows, if it borrows and has none yet."""
        for segment in self.prefix[:1]:
            for layer, like in zip(self.layers, segment.cache.layers, strict=True):
                if not layer.is_initialized:
                    layer.lazy_initialization(like.keys, like.values)

    def advance(self, tokens: int) -> None:
        """Increase the length by tokens whose keys and values are already in the buffers."""
        assert self.length + tokens <= self.capacity
        for layer in self.layers:
            layer.length += tokens

    def rollback(self, length: int) -> None:
        """Drop all tokens from index ``length`` on; nothing is copied, unless others borrow it.

        The prefix stays, unless all tokens are dropped. What others borrow stays theirs.
        """
        if length == 0 and self.prefix:
            self._leave_buffers()
            self.prefix, self.prefix_length = (), 0
            self.layers = [PreallocatedLayer(self.capacity) for _ in self.layers]
        own = length - self.prefix_length
        assert 0 <= own <= self.capacity
        if own < self._most_lent and own < self.lent:
            self._leave_buffers(own)
        for layer in self.layers:
            # min, because a forward pass that failed half-way leaves layers of unequal length.
            layer.length = min(layer.length, own)

    def _leave_buffers(self, own: int = 0) -> None:
        """Leave its buffers to those who borrow them, and go on with copies of its first tokens."""
        left = KVCache(len(self.layers), self.capacity, self.prefix)
        left.layers, left.origin = self.layers, self.origin
        left.position_offset, left._most_lent = self.position_offset, self._most_lent
        left._borrowers, self._borrowers, self._most_lent = self._borrowers, (), 0
        for borrower, _ in left._borrowers:
            if (found := borrower()) is not None:
                found.prefix = tuple(
                    segment._replace(cache=left) if segment.cache is self else segment
                    for segment in found.prefix
                )
        self.layers = [old.first(min(own, old.length), old.capacity) for old in left.layers]

    def segments(self, length: int) -> tuple[Segment, ...]:
        """The buffers that hold the first ``length`` tokens, in order."""
        found: list[Segment] = []
        for segment in (*self.prefix, Segment(self, length)):
            end = min(segment.end, length)
            if end > 0:
                found.append(Segment(segment.cache, end))
            length -= end
        return tuple(found)

    def borrow(self, length: int, capacity: int) -> KVCache:
        """A cache for ``capacity`` tokens that begins with the first ``length`` of this one.

        They must not change here while the new cache is in use.
        """
        borrowed = KVCache(len(self.layers), capacity, self.segments(length))
        borrowed.origin, borrowed.position_offset = self.origin, self.position_offset
        for cache, end in borrowed.prefix:
            living = (each for each in cache._borrowers if each[0]() is not None)
            cache._borrowers = (*living, (ref(borrowed), end))
            cache._most_lent = max(cache._most_lent, end)
        return borrowed

    @property
    def lent(self) -> int:
        """Number of its own first tokens that other caches borrow, and that must not change."""
        living = (end for borrower, end in self._borrowers if borrower() is not None)
        return max(living, default=0)

    def copy_prefix(self, length: int, capacity: int) -> KVCache:
        """Copy the first ``length`` tokens to a new cache for ``capacity`` tokens."""
        copied = KVCache(len(self.layers), capacity)
        copied.origin = self.origin
        for cache, end in self.segments(length):
            for old, new in zip(cache.layers, copied.layers, strict=True):
                new.update(old.keys[:, :, :end], old.values[:, :, :end])
        return copied

    def grow(self, capacity: int) -> None:
        """Move to larger buffers, layer by layer, so that the peak memory is one layer more."""
        for index, old in enumerate(self.layers):
            # Filled before it is put here, as other threads may read what was borrowed.
            self.layers[index] = old.first(old.length, capacity)
        self.capacity = capacity


def kv_shape(config: Any) -> tuple[int, int, int]:
    """(layers, KV heads, head size) of the model with this text config."""
    head_dim = getattr(config, "head_dim", None)
    return (
        config.num_hidden_layers,
        config.num_key_value_heads,
        head_dim or config.hidden_size // config.num_attention_heads,
    )


def kv_nbytes(config: Any, dtype: torch.dtype, capacity: int) -> int:
    """Bytes of an allocated cache for ``capacity`` tokens.

    Args:
        config: the model's text config.
        dtype: dtype of keys and values.
        capacity: maximum number of tokens.
    """
    layers, heads, dim = kv_shape(config)
    return layers * 2 * heads * dim * capacity * dtype.itemsize


def cache_argument(forward: Callable[..., Any]) -> str:
    """Name of the parameter for the KV cache in a function such as a model's ``forward``.

    transformers 5.24 renamed ``past_key_values`` to ``cache``; models outside of transformers may
    have the old name. For a function that only forwards its arguments this is the name that
    ``generate`` uses.

    Args:
        forward: function with a parameter for a KV cache.
    """
    for function in (forward, GenerationMixin.prepare_inputs_for_generation):
        parameters = signature(function).parameters
        for name in _CACHE_NAMES:
            if name in parameters:
                return name
    raise AssertionError("transformers' generate has no cache")

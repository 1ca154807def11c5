"""A KV cache that is allocated once: writing is in place, and rolling back sets a length."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import Cache, CacheLayerMixin

_CACHE_NAMES = ("cache", "past_key_values")


class KVOrigin(NamedTuple):
    """What computes keys and values: a model as it was, and how it turned them.

    Attributes:
        number: :attr:`rapid_llm.engine.identity.ModelState.number`.
        scale: how many of the lengths at which the rotary embedding changes the sequence exceeds.
    """

    number: int
    scale: int


class PreallocatedLayer(CacheLayerMixin):
    """Keys and values of one layer, ``[1, kv_heads, capacity, dim]``, filled up to ``length``.

    A sliding-window layer keeps the whole sequence too, since a window that has dropped its
    oldest keys could not be rolled back; the attention applies the window.
    """

    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Here, not in __init__: only now is it known on which device this layer runs.
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
        """Append ``[1, kv_heads, n, dim]`` and return views of everything filled so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity


class KVCache(Cache):
    """The preallocated layers of one sequence (batch size 1).

    Attributes:
        position_offset: tokens of the sequence that it left out on purpose; those that follow keep
            their own positions.
        expected: tokens of the sequence whose next part is read, where that is not its end; some
            kinds of rotary embedding depend on it.
        origin: what computed what it holds (see ``ModelRunner.origin``); None if nothing did yet,
            or if it is not known.
    """

    layers: list[PreallocatedLayer]

    def __init__(self, num_layers: int, capacity: int) -> None:
        super().__init__(layers=[PreallocatedLayer(capacity) for _ in range(num_layers)])
        self.capacity = capacity
        self.position_offset = 0
        self.expected = 0
        self.origin: KVOrigin | None = None

    @property
    def length(self) -> int:
        """Tokens that every layer holds: during a pass the first layers are ahead."""
        return min(layer.length for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes allocated: ``layers * 2 * kv_heads * capacity * dim * itemsize``."""
        tensors = [t for layer in self.layers for t in (layer.keys, layer.values)]
        return sum(t.nbytes for t in tensors if t is not None)

    def advance(self, tokens: int) -> None:
        """Count tokens whose keys and values were written to the buffers behind what they hold."""
        assert self.length + tokens <= self.capacity
        for layer in self.layers:
            layer.length += tokens

    def rollback(self, length: int) -> None:
        """Forget every token from position ``length`` on. Nothing is copied."""
        assert 0 <= length <= self.capacity
        for layer in self.layers:
            # min: a forward pass that failed half-way leaves layers of unequal length.
            layer.length = min(layer.length, length)

    def copy_prefix(self, length: int, capacity: int) -> KVCache:
        """A new cache for ``capacity`` tokens that begins with the first ``length`` of this one."""
        copied = KVCache(len(self.layers), capacity)
        copied.origin = self.origin
        for old, new in zip(self.layers, copied.layers, strict=True):
            new.update(old.keys[:, :, :length], old.values[:, :, :length])
        return copied

    def grow(self, capacity: int) -> None:
        """Move to larger buffers, layer by layer: never are there two of the whole cache."""
        for index, old in enumerate(self.layers):
            self.layers[index] = new = PreallocatedLayer(capacity)
            new.update(old.keys[:, :, : old.length], old.values[:, :, : old.length])
        self.capacity = capacity


def kv_shape(config: Any) -> tuple[int, int, int]:
    """(layers, KV heads, head size) of the model that has this text config."""
    head_dim = getattr(config, "head_dim", None)
    return (
        config.num_hidden_layers,
        config.num_key_value_heads,
        head_dim or config.hidden_size // config.num_attention_heads,
    )


def kv_nbytes(config: Any, dtype: torch.dtype, capacity: int) -> int:
    """Bytes that a cache for ``capacity`` tokens will take once it is allocated."""
    layers, heads, dim = kv_shape(config)
    return layers * 2 * heads * dim * capacity * dtype.itemsize


def cache_argument(takes_a_cache: Callable[..., Any]) -> str:
    """What a function (a model's ``forward``, ``generate``) calls the KV cache it is given.

    transformers 5.24 renamed ``past_key_values`` to ``cache``; models that are not its own may
    have the name that they had. A function that only passes its arguments on gets the name by
    which ``generate`` would call it.
    """
    for function in (takes_a_cache, GenerationMixin.prepare_inputs_for_generation):
        parameters = signature(function).parameters
        for name in _CACHE_NAMES:
            if name in parameters:
                return name
    raise AssertionError("transformers' generate has no cache")

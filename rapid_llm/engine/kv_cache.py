"""A KV cache that is allocated once: writing is in place, and rolling back sets a length."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


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
    """The preallocated layers of one sequence (batch size 1)."""

    layers: list[PreallocatedLayer]

    def __init__(self, num_layers: int, capacity: int) -> None:
        super().__init__(layers=[PreallocatedLayer(capacity) for _ in range(num_layers)])
        self.capacity = capacity

    @property
    def length(self) -> int:
        return self.layers[0].length

    @property
    def nbytes(self) -> int:
        """Bytes allocated: ``layers * 2 * kv_heads * capacity * dim * itemsize``."""
        tensors = [t for layer in self.layers for t in (layer.keys, layer.values)]
        return sum(t.nbytes for t in tensors if t is not None)

    def rollback(self, length: int) -> None:
        """Forget every token from position ``length`` on. Nothing is copied."""
        assert 0 <= length <= self.capacity
        for layer in self.layers:
            # min: a forward pass that failed half-way leaves layers of unequal length.
            layer.length = min(layer.length, length)

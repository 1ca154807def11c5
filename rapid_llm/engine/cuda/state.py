"""State of a KV cache for kernels: an int64 tensor on the device with its length and addresses.

A captured graph repeats fixed work on fixed addresses. So everything that changes from pass to pass
is data in this tensor: the length of the cache, and even the addresses of its buffers. One graph
then works for all caches of its model at any length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rapid_llm.engine.kv_cache import KVCache

PAST = 0
"""Index of the number of tokens in the cache before the pass."""

POSITION_OFFSET = 1
"""Index of the number of the sequence's tokens that are left out of the cache."""

CAPACITY = 2
"""Index of the capacity of the buffers in tokens."""

SLOT = 3
"""Index of the current draft step."""

BUFFERS = 4
"""First index of the addresses of each layer's keys and values, ``[kv_heads, capacity, dim]``."""


def size_of(layers: int) -> int:
    """Length of the state tensor for a number of layers."""
    return BUFFERS + 2 * layers


def describe(cache: KVCache) -> Tensor:
    """State of an allocated cache, int64 ``[size_of(layers)]`` on the host."""
    buffers = [t.data_ptr() for layer in cache.layers for t in (layer.keys, layer.values)]
    return torch.tensor([cache.length, cache.position_offset, cache.capacity, 0, *buffers])

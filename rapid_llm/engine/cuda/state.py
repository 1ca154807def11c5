"""Where a cache stands, as kernels read it: int64 numbers on the device.

A captured graph repeats fixed work on fixed addresses. So what changes from pass to pass is data:
how many tokens the cache holds, and even where its buffers are. One graph then serves every cache
of its model, however long it has become.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rapid_llm.engine.kv_cache import KVCache

PAST = 0
"""Tokens that the cache holds before the pass."""

POSITION_OFFSET = 1
"""Positions of the sequence that it left out."""

CAPACITY = 2
"""Tokens that its buffers have room for."""

SLOT = 3
"""The number of a draft step."""

BUFFERS = 4
"""From here on the addresses of each layer's keys and values, ``[kv_heads, capacity, dim]``."""


def size_of(layers: int) -> int:
    """Numbers in the state of a cache of so many layers."""
    return BUFFERS + 2 * layers


def describe(cache: KVCache) -> Tensor:
    """The state of an allocated cache: int64 ``[size_of(layers)]`` on the host."""
    buffers = [t.data_ptr() for layer in cache.layers for t in (layer.keys, layer.values)]
    return torch.tensor([cache.length, cache.position_offset, cache.capacity, 0, *buffers])

"""Causal attention by PyTorch's fused kernels, for any device.

The query heads that share a KV head become rows of one matrix (GQA packing) where queries are few,
so that keys and values are not repeated.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

Kernel = Callable[..., Tensor]
"""``(query, key, value, scaling, window)``, as for :func:`rapid_llm.engine.attention.attend`."""

FEW_QUERIES = 32
"""Up to here packing beats a causal kernel over repeated query heads."""


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    """The same through PyTorch's fused kernels (FlashAttention and its kin on a GPU)."""
    n, length = query.shape[1], key.shape[1]
    if n > FEW_QUERIES and window is None:
        bias = causal_lower_right(n, length)
        return F.scaled_dot_product_attention(
            query[None], key[None], value[None], bias, scale=scaling, enable_gqa=True
        )[0]
    mask = causal_mask(n, length, window, query.device)
    if n > FEW_QUERIES:
        return F.scaled_dot_product_attention(
            query[None], key[None], value[None], mask, scale=scaling, enable_gqa=True
        )[0]
    return _attend_packed(query, key, value, scaling, mask)


def _attend_packed(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None
) -> Tensor:
    heads, n, dim = query.shape
    kv_heads = key.shape[0]
    group = heads // kv_heads
    mask = None if mask is None else mask.repeat(group, 1)
    packed = query.reshape(1, kv_heads, group * n, dim)
    out = F.scaled_dot_product_attention(packed, key[None], value[None], mask, scale=scaling)
    return out.reshape(heads, n, -1)


def causal_mask(n: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """Mask of the keys that a query attends to: bool ``[n, keys]``; None where it is all of them.

    The last query stands at the last key.
    """
    if n == 1 and (window is None or keys <= window):
        return None
    ones = torch.ones(n, keys, dtype=torch.bool, device=device)
    mask = ones.tril(keys - n)
    if window is not None:
        mask &= ones.triu(keys - n - window + 1)
    return mask

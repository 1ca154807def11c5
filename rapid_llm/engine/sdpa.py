"""Causal attention with PyTorch's fused kernels (SDPA), for any device.

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
"""Function with the arguments of :func:`rapid_llm.engine.attention.attend`, all positional."""

PartKernel = Callable[..., tuple[Tensor, Tensor]]
"""Function with the arguments of :func:`attend_part`, all positional."""

FEW_QUERIES = 32
"""Number of queries up to which packing is faster than a causal kernel with repeated KV heads."""


_MOST_WEIGHT = 64.0
"""Maximum sum of weights in float16, whose smallest normal number is 6e-5."""


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    """See :func:`rapid_llm.engine.attention.attend`; runs SDPA (FlashAttention on a GPU)."""
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


def attend_part(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention of a few tokens to a part of their keys, to be merged with that to the others.

    Args:
        query: queries, ``[kv_heads, group * tokens, dim]``: for each query head of a KV head the
            rows of all tokens.
        key, value: ``[kv_heads, keys, dim]``, same dtype.
        scaling: factor on the scores.
        mask: what each token must not see of the last keys, bool ``[tokens, at most keys]``; None
            if it sees all.
        causal: whether the mask is the causal rule over the tokens' own keys, which are the last.

    Returns:
        Attention to this part, float32 ``[kv_heads, group * tokens, dim]``, and the natural
        log-sum-exp of each row's scores, float32 ``[kv_heads, group * tokens]``; -inf and 0 for a
        row that sees nothing.
    """
    nothing = query.new_empty(1, 1, 1)
    scores = torch.baddbmm(nothing, query, key.transpose(1, 2), beta=0, alpha=scaling).float()
    weights, total, lse = softmax_part(scores, mask, value.dtype)
    return (weights.to(value.dtype) @ value).float() / total[..., None], lse


def softmax_part(
    scores: Tensor, mask: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax of scores, float32 ``[heads, rows, keys]``, which are overwritten.

    Args:
        scores: the scores.
        mask: that of :func:`attend_part`.
        dtype: dtype in which the values will be summed.

    Returns:
        Weights that are not normalised, their sums (1 for a row that sees nothing, whose weights
        are 0), and the log-sum-exp of the scores.
    """
    if mask is not None:
        tokens, masked = mask.shape
        ends = scores.view(scores.shape[0], -1, tokens, scores.shape[-1])[..., -masked:]
        ends.masked_fill_(mask, float("-inf"))
    top = scores.amax(dim=-1)
    safe = top.clamp(min=torch.finfo(torch.float32).min)  # not where nothing is seen
    weights = scores.sub_(safe[..., None]).exp_()
    total = weights.sum(dim=-1)
    lse = safe + total.log()
    total = torch.where(total > 0, total, 1.0)
    if dtype == torch.float16:  # sums of values with weights near 1 would overflow
        shrink = (_MOST_WEIGHT / total).clamp(max=1.0)
        weights.mul_(shrink[..., None])
        total = total * shrink
    return weights, total, lse


def causal_mask(n: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """Causal mask, bool ``[n, keys]``, True where a query may attend; None if all entries are.

    Args:
        n: number of queries; the last one is at the position of the last key.
        keys: number of keys.
        window: size of the sliding window; None for full causal attention.
        device: device of the mask.
    """
    if n == 1 and (window is None or keys <= window):
        return None
    ones = torch.ones(n, keys, dtype=torch.bool, device=device)
    mask = ones.tril(keys - n)
    if window is not None:
        mask &= ones.triu(keys - n - window + 1)
    return mask

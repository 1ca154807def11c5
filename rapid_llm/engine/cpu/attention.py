"""Attention on a CPU: the compiled kernel, or the fastest PyTorch operators for each shape."""

from __future__ import annotations

from functools import wraps

import torch
from torch import Tensor

from rapid_llm.engine import sdpa
from rapid_llm.engine.cpu import kernels
from rapid_llm.engine.cpu.products import fast_dtype
from rapid_llm.engine.sdpa import FEW_QUERIES, causal_mask, softmax_part

# Tuned in bfloat16:
_QUERY_BLOCK = 64  # queries per block, which bounds the score matrix to [group * 64, keys]
_SHORT = 1024  # keys up to which one batched product with a copy beats one product per head
_MANY_ROWS = 64  # rows of a KV head from which the compiled kernel is faster than products
_KEY_PARTS = 4  # parts of a long sum over keys for few queries, which else runs on one thread


def attention(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> sdpa.Kernel:
    """Fastest kernel for these arguments of :func:`rapid_llm.engine.attention.attend`."""
    n, length = query.shape[1], key.shape[1]
    if n > FEW_QUERIES and kernels.serves(query, key, value):
        return kernels.attend
    if n == 1 and length <= _SHORT:
        return sdpa.attend
    if n <= FEW_QUERIES and length <= _SHORT:
        return _attend_batched
    return _attend_products


def _in_fast_dtype(kernel: sdpa.Kernel) -> sdpa.Kernel:
    """Wrap a kernel to compute in the dtype that this CPU multiplies fast."""

    @wraps(kernel)
    def run(
        query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        wide = (tensor.to(fast_dtype(tensor.dtype)) for tensor in (query, key, value))
        return kernel(*wide, scaling, window).to(query.dtype)

    return run


@_in_fast_dtype
def _attend_batched(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
) -> Tensor:
    """Two batched products over all KV heads: few calls, for few queries and few keys."""
    heads, n, dim = query.shape
    kv_heads, length = key.shape[0], key.shape[1]
    packed = query.reshape(kv_heads, -1, dim)
    scores = torch.baddbmm(
        packed.new_empty(1, 1, 1), packed, key.transpose(1, 2), beta=0, alpha=scaling
    )
    mask = causal_mask(n, length, window, query.device)
    if mask is not None:
        scores.view(kv_heads, -1, n, length).masked_fill_(mask.logical_not_(), float("-inf"))
    return torch.bmm(scores.softmax(dim=-1), value).view(heads, n, -1)


@_in_fast_dtype
def _attend_products(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
) -> Tensor:
    """Two matrix products per KV head with a softmax between: faster than SDPA on a CPU.

    The products are not batched, because a slice ``[:length]`` of one head's buffer is contiguous,
    but the slice over all heads is not, and would be copied first.
    """
    heads, n, dim = query.shape
    kv_heads, length = key.shape[0], key.shape[1]
    group = heads // kv_heads
    packed = query.view(kv_heads, group, n, dim)
    out = query.new_empty(kv_heads, group, n, value.shape[-1])
    for start in range(0, n, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, n)
        last = length - n + stop  # end of the keys that the block's last query attends to
        first = 0 if window is None else max(0, length - n + start - window + 1)
        # Without a window only the block's own keys need a mask.
        masked = stop - start if window is None else last - first
        mask = causal_mask(stop - start, masked, window, query.device)
        hidden = None if mask is None else mask.logical_not_()
        for head in range(kv_heads):
            rows = packed[head, :, start:stop].reshape(-1, dim)
            scores = torch.addmm(
                rows.new_empty(1, 1), rows, key[head, first:last].T, beta=0, alpha=scaling
            )
            if hidden is not None:
                columns = scores.view(group, stop - start, -1)[..., -masked:]
                columns.masked_fill_(hidden, float("-inf"))
            mixed = _mix(scores.softmax(dim=-1), value[head, first:last])
            out[head, :, start:stop] = mixed.view(group, stop - start, -1)
    return out.view(heads, n, -1)


def attend_part(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`rapid_llm.engine.sdpa.attend_part`; by the kernel for many tokens.

    Else by two matrix products per KV head.
    """
    kv_heads, count, _ = query.shape
    if count > _MANY_ROWS and (mask is None or causal):
        # Without a mask all rows are alike, whatever head and token they belong to.
        group = next(each for each in (4, 3, 2, 1) if count % each == 0)
        tokens = count // group if mask is None else mask.shape[0]
        by_head = query.reshape(-1, tokens, query.shape[-1])
        if kernels.serves(by_head, key, value):
            out, lse = kernels.attend_part(by_head, key, value, scaling, causal)
            return out.view(kv_heads, count, -1), lse.view(kv_heads, count)
    if key.shape[1] <= _SHORT:  # batched products are fast in float32 alone
        query, key, value = query.float(), key.float(), value.float()
        return sdpa.attend_part(query, key, value, scaling, mask, causal)
    fast = fast_dtype(query.dtype)
    out = query.new_empty(query.shape, dtype=torch.float32)
    lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    for head in range(key.shape[0]):
        rows, keys = query[head].to(fast), key[head].to(fast)
        scores = torch.addmm(rows.new_empty(1, 1), rows, keys.T, beta=0, alpha=scaling)
        weights, total, sums = softmax_part(scores.float()[None], mask, fast)
        lse[head] = sums[0]
        mixed = _mix(weights[0].to(fast), value[head].to(fast)).float()
        out[head] = mixed / total[0, :, None]
    return out, lse


def _mix(weights: Tensor, value: Tensor) -> Tensor:
    """``weights @ value``, ``[rows, keys] @ [keys, value_dim]``, on all threads."""
    rows, keys = weights.shape
    if rows > 4 * FEW_QUERIES or keys <= 2 * _SHORT:
        return weights @ value
    whole = keys - keys % _KEY_PARTS
    parts = weights[:, :whole].view(rows, _KEY_PARTS, -1).transpose(0, 1)
    mixed = torch.bmm(parts, value[:whole].view(_KEY_PARTS, -1, value.shape[-1])).sum(dim=0)
    return mixed if whole == keys else mixed.addmm_(weights[:, whole:], value[whole:])

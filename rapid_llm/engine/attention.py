"""Causal attention that reads each KV head once, for 1, γ+1 or a chunk of query tokens.

The query heads that share a KV head become rows of one matrix (GQA packing), so keys and values
are never repeated. The causal mask is aligned to the lower right corner: the last query sees
every key. Batch size is 1, without padding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface

from rapid_llm.engine import native
from rapid_llm.engine.cuda import has_kernels, prefill
from rapid_llm.engine.products import fast_dtype
from rapid_llm.errors import ModelError

_Kernel = Callable[..., Tensor]

NAME = "rapid"
"""Under this name transformers knows our attention (``attn_implementation="rapid"``)."""

_FEW_QUERIES = 32  # up to here packing beats a causal kernel over repeated query heads
# On a CPU, where each number was the best of its neighbours in bfloat16:
_QUERY_BLOCK = 64  # bounds the score matrix to [group * 64, keys]
_SHORT = 1024  # keys up to which copying all heads' slices costs less than a product a head
_KEY_PARTS = 4  # a long sum over keys for few queries runs on one thread unless it is divided


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    window: int | None = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """Softmax attention of the last ``n`` positions of a sequence of ``length`` tokens.

    Args:
        query: ``[heads, n, dim]``, any float dtype.
        key: ``[kv_heads, length, dim]``, the same dtype; ``heads`` is a multiple of ``kv_heads``.
        value: ``[kv_heads, length, value_dim]``.
        scaling: factor on the scores, usually ``dim ** -0.5``.
        window: a query at position i sees the keys in ``(i - window, i]``; None sees all up to i.
        hidden: bool ``[n, length]``, in the place of these rules: True where a query must not look.

    Returns:
        ``[heads, n, value_dim]`` in the query's dtype.
    """
    if hidden is not None:
        return _attend_packed(query, key, value, scaling, ~hidden)
    if window is not None and window >= key.shape[1]:
        window = None
    return _kernel(query, key, value, window)(query, key, value, scaling, window)


def _kernel(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> _Kernel:
    """What is fastest for this device, dtype and shape."""
    n, length = query.shape[1], key.shape[1]
    if n > _FEW_QUERIES and native.serves(query, key, value):
        return native.attend
    if query.device.type == "cuda":
        return _cuda_kernel(query, value, window)
    if query.device.type != "cpu" or (n == 1 and length <= _SHORT):
        return _attend_sdpa
    if n <= _FEW_QUERIES and length <= _SHORT:
        return _attend_batched
    return _attend_products


def _cuda_kernel(query: Tensor, value: Tensor, window: int | None) -> _Kernel:
    """Never a mask tensor, and never SDPA over a cache that grows token by token."""
    if prefill.serves(query, value.shape[1], window):
        return prefill.attend_chunk
    fused = query.shape[1] > _FEW_QUERIES and window is None and query.dtype != torch.float32
    if fused or query.shape[2] != value.shape[2] or not has_kernels(query.device):
        return _attend_sdpa
    from rapid_llm.engine.cuda import attention  # Triton, which not every machine has

    return attention.attend


def _in_fast_dtype(kernel: _Kernel) -> _Kernel:
    """The same of tensors in the dtype that this machine multiplies fast."""

    @wraps(kernel)
    def run(
        query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        wide = (tensor.to(fast_dtype(tensor)) for tensor in (query, key, value))
        return kernel(*wide, scaling, window).to(query.dtype)

    return run


@_in_fast_dtype
def _attend_batched(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
) -> Tensor:
    """Two batched products over all KV heads: few queries and few keys, so few calls count."""
    heads, n, dim = query.shape
    kv_heads, length = key.shape[0], key.shape[1]
    packed = query.reshape(kv_heads, -1, dim)
    scores = torch.baddbmm(
        packed.new_empty(1, 1, 1), packed, key.transpose(1, 2), beta=0, alpha=scaling
    )
    hidden = _hidden(n, length, window, query.device)
    if hidden is not None:
        scores.view(kv_heads, -1, n, length).masked_fill_(hidden, float("-inf"))
    return torch.bmm(scores.softmax(dim=-1), value).view(heads, n, -1)


@_in_fast_dtype
def _attend_products(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
) -> Tensor:
    """Two matrix products a KV head with a softmax between: on a CPU faster than SDPA.

    One product a head, not a batched one: a slice ``[:length]`` of one head's buffer is
    contiguous, the slice over all heads is not and would be copied first.
    """
    heads, n, dim = query.shape
    kv_heads, length = key.shape[0], key.shape[1]
    group = heads // kv_heads
    packed = query.view(kv_heads, group, n, dim)
    out = query.new_empty(kv_heads, group, n, value.shape[-1])
    for start in range(0, n, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, n)
        last = length - n + stop  # keys that the block's last query sees
        first = 0 if window is None else max(0, length - n + start - window + 1)
        # Without a window only the block's own keys can be ahead of its queries.
        masked = stop - start if window is None else last - first
        hidden = _hidden(stop - start, masked, window, query.device)
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


def _mix(weights: Tensor, value: Tensor) -> Tensor:
    """``weights @ value``, ``[rows, keys] @ [keys, value_dim]``, on every thread."""
    rows, keys = weights.shape
    if rows > 4 * _FEW_QUERIES or keys <= 2 * _SHORT:
        return weights @ value
    whole = keys - keys % _KEY_PARTS
    parts = weights[:, :whole].view(rows, _KEY_PARTS, -1).transpose(0, 1)
    mixed = torch.bmm(parts, value[:whole].view(_KEY_PARTS, -1, value.shape[-1])).sum(dim=0)
    return mixed if whole == keys else mixed.addmm_(weights[:, whole:], value[whole:])


def _attend_sdpa(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
) -> Tensor:
    """The same through PyTorch's fused kernels (FlashAttention and its kin on a GPU)."""
    n, length = query.shape[1], key.shape[1]
    if n > _FEW_QUERIES and window is None:
        mask = causal_lower_right(n, length)
        return F.scaled_dot_product_attention(
            query[None], key[None], value[None], mask, scale=scaling, enable_gqa=True
        )[0]
    hidden = _hidden(n, length, window, query.device)
    if n > _FEW_QUERIES:
        visible = None if hidden is None else ~hidden
        return F.scaled_dot_product_attention(
            query[None], key[None], value[None], visible, scale=scaling, enable_gqa=True
        )[0]
    return _attend_packed(query, key, value, scaling, None if hidden is None else ~hidden)


def _attend_packed(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, visible: Tensor | None
) -> Tensor:
    heads, n, dim = query.shape
    kv_heads = key.shape[0]
    group = heads // kv_heads
    mask = None if visible is None else visible.repeat(group, 1)
    packed = query.reshape(1, kv_heads, group * n, dim)
    out = F.scaled_dot_product_attention(packed, key[None], value[None], mask, scale=scaling)
    return out.reshape(heads, n, -1)


def _hidden(n: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """True where a query must not look: bool ``[n, keys]``, or None if every key is seen.

    The last query stands at the last key.
    """
    if n == 1 and (window is None or keys <= window):
        return None
    ones = torch.ones(n, keys, dtype=torch.bool, device=device)
    hidden = ones.triu(keys - n + 1)
    if window is not None:
        hidden |= ones.tril(keys - n - window)
    return hidden


def _rapid_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: ``[1, heads, n, dim]`` in, ``[1, n, heads, value_dim]`` out."""
    if attention_mask is not None or softcap is not None or s_aux is not None:
        raise ModelError(
            f"{type(module).__name__} asks for an attention mask, soft-capping or sinks, which "
            "the 'rapid' attention does not do; load the model with attn_implementation='sdpa'"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = attend(query[0], key[0], value[0], scale, sliding_window)
    return out.transpose(0, 1)[None], None


def _no_mask(*_: Any, **__: Any) -> None:
    """The mask follows from the shapes, so transformers need not build one."""
    return


AttentionInterface.register(NAME, _rapid_attention)
AttentionMaskInterface.register(NAME, _no_mask)

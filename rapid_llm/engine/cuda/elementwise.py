"""Triton kernels between the matrix products of a pass: norms, rotary embedding, activation, merge.

They compute in float32 and round where the lean forward pass rounds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rapid_llm.engine.cuda.batch import CACHE, TOKEN, BatchState
from rapid_llm.engine.cuda.state import BUFFERS, CAPACITY, PAST

_PAST = tl.constexpr(PAST)
_CAPACITY = tl.constexpr(CAPACITY)
_BUFFERS = tl.constexpr(BUFFERS)
_TOKEN = tl.constexpr(TOKEN)
_CACHE = tl.constexpr(CACHE)


@triton.jit
def _add_rms_norm(
    x, delta, weight, out, epsilon, SIZE: tl.constexpr, WIDTH: tl.constexpr, ADDS: tl.constexpr
):
    row = tl.program_id(0) * SIZE
    columns = tl.arange(0, WIDTH)
    there = columns < SIZE
    total = tl.load(x + row + columns, mask=there, other=0.0)
    if ADDS:
        total += tl.load(delta + row + columns, mask=there, other=0.0)
        tl.store(x + row + columns, total, mask=there)
    wide = total.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / SIZE + epsilon)
    scaled = wide * tl.load(weight + columns, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row + columns, scaled.to(out.dtype.element_ty), mask=there)


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
    """Add ``delta`` to the residual stream ``x`` in place, and return its RMS norm.

    Args:
        x: residual stream, ``[n, size]``.
        delta: update to add, ``[n, size]``; None for none.
        weight: weight of the norm, ``[size]``.
        epsilon: epsilon of the norm.

    Returns:
        The normalised stream, ``[n, size]``.
    """
    n, size = x.shape
    out = torch.empty_like(x)
    width = triton.next_power_of_2(size)
    _add_rms_norm[(n,)](
        x,
        x if delta is None else delta,
        weight,
        out,
        epsilon,
        SIZE=size,
        WIDTH=width,
        ADDS=delta is not None,
        num_warps=min(16, max(1, width // 512)),
    )
    return out


@triton.jit
def _silu_times(pairs, out, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = columns < size
    gate = tl.load(pairs + 2 * row * size + columns, mask=there, other=0.0).to(tl.float32)
    up = tl.load(pairs + (2 * row + 1) * size + columns, mask=there, other=0.0)
    gated = (gate / (1.0 + tl.exp(-gate))).to(up.dtype) * up
    tl.store(out + row * size + columns, gated, mask=there)


def silu_times(pairs: Tensor) -> Tensor:
    """``silu(gate) * up``, ``[n, size]``, for rows of gate and up, ``[n, 2 * size]``."""
    n, size = pairs.shape[0], pairs.shape[1] // 2
    out = pairs.new_empty(n, size)
    block = min(1024, triton.next_power_of_2(size))
    _silu_times[(n, triton.cdiv(size, block))](pairs, out, size, BLOCK=block, num_warps=4)
    return out


@triton.jit
def _normed(x, weight, columns, there, epsilon, SIZE: tl.constexpr):
    wide = x.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / SIZE + epsilon)
    scaled = wide * tl.load(weight + columns, mask=there, other=0.0).to(tl.float32)
    return scaled.to(x.dtype)


@triton.jit(do_not_specialize=["layer", "heads", "kv_heads", "cache_size"])
def _rotate_and_store(
    qkv,
    cosine,
    sine,
    query_norm,
    key_norm,
    epsilon,
    state,
    tokens,
    layer,
    heads,
    kv_heads,
    cache_size,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    NORMS: tl.constexpr,
    JOINED: tl.constexpr,
):
    """One head of one token: rotate a query in place, or write a key or value to the cache."""
    token, head = tl.program_id(0), tl.program_id(1)
    half: tl.constexpr = DIM // 2
    columns = tl.arange(0, WIDTH)
    there = columns < DIM
    across = tl.where(columns < half, columns + half, columns - half)
    row = qkv + (token * (heads + 2 * kv_heads) + head) * DIM
    x = tl.load(row + columns, mask=there, other=0.0)
    if head < heads + kv_heads:
        other = tl.load(row + across, mask=there, other=0.0)
        if NORMS:
            norm = query_norm
            if head >= heads:
                norm = key_norm
            other_norm = norm
            x = _normed(x, norm, columns, there, epsilon, DIM)
            other = _normed(other, other_norm, across, there, epsilon, DIM)
        cos = tl.load(cosine + token * DIM + columns, mask=there, other=0.0).to(tl.float32)
        sin = tl.load(sine + token * DIM + columns, mask=there, other=0.0).to(tl.float32)
        sin = tl.where(columns < half, -sin, sin)
        x = (x.to(tl.float32) * cos + other.to(tl.float32) * sin).to(x.dtype)
    if head < heads:
        tl.debug_barrier()  # read all of the head before any of it is written
        tl.store(row + columns, x, mask=there)
    else:
        which = (head - heads) // kv_heads  # 0 for a key, 1 for a value
        if JOINED:  # state holds several caches, and each token says which is its own
            cache = tl.load(tokens + token * _TOKEN + 1)
            mine = there & (cache >= 0)
            place = tl.load(tokens + token * _TOKEN + 2)
            of_cache = state + tl.maximum(cache, 0) * cache_size
            capacity = tl.load(of_cache)
            address = of_cache + _CACHE
        else:
            mine = there
            place = tl.load(state + _PAST) + token
            capacity = tl.load(state + _CAPACITY)
            address = state + _BUFFERS
        at = (head - heads) % kv_heads * capacity + place
        buffer = tl.load(address + 2 * layer + which).to(qkv.dtype)
        tl.store(buffer + at * DIM + columns, x, mask=mine)


def rotate_and_store(
    qkv: Tensor,
    rotary: tuple[Tensor, Tensor],
    norms: tuple[Tensor, Tensor, float] | None,
    state: Tensor | BatchState,
    layer: int,
    heads: int,
    kv_heads: int,
) -> Tensor:
    """Apply the rotary embedding to queries and keys, and append keys and values to the cache.

    Args:
        qkv: queries, keys and values of new tokens, ``[n, (heads + 2 * kv_heads) * dim]``,
            contiguous; overwritten.
        rotary: cosines and sines of the new positions, ``[n, dim]`` each.
        norms: weights ``[dim]`` of the RMS norms of queries and keys, and their epsilon (Qwen3);
            None for models without.
        state: state of the cache, int64, see :mod:`rapid_llm.engine.cuda.state`, or of the caches
            of a joined pass.
        layer: index of the layer.
        heads, kv_heads: numbers of query heads and KV heads.

    Returns:
        The rotated queries, ``[n, heads, dim]``: a view of ``qkv``.
    """
    n = qkv.shape[0]
    split = qkv.view(n, heads + 2 * kv_heads, -1)
    dim = split.shape[-1]
    query_norm, key_norm, epsilon = norms or (qkv, qkv, 0.0)
    if isinstance(state, BatchState):
        where, tokens = state.caches, state.tokens
    else:
        where = tokens = state
    _rotate_and_store[(n, heads + 2 * kv_heads)](
        qkv,
        *rotary,
        query_norm,
        key_norm,
        epsilon,
        where,
        tokens,
        layer,
        heads,
        kv_heads,
        where.shape[-1],
        DIM=dim,
        WIDTH=triton.next_power_of_2(dim),
        NORMS=norms is not None,
        JOINED=isinstance(state, BatchState),
        num_warps=1,
    )
    return split[:, :heads]


@triton.jit
def _merge(
    one, one_lse, other, other_lse, out, lse, n,
    one_head, one_row, other_head, other_row, out_head, out_row,
    SIZE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    head, place = row // n, row % n
    columns = tl.arange(0, WIDTH)
    there = columns < SIZE
    here_lse, there_lse = tl.load(one_lse + row), tl.load(other_lse + row)
    top = tl.maximum(here_lse, there_lse)
    here, away = tl.exp(here_lse - top), tl.exp(there_lse - top)
    a = tl.load(one + head * one_head + place * one_row + columns, mask=there, other=0.0)
    b = tl.load(other + head * other_head + place * other_row + columns, mask=there, other=0.0)
    mixed = (a.to(tl.float32) * here + b.to(tl.float32) * away) / (here + away)
    tl.store(out + head * out_head + place * out_row + columns, mixed, mask=there)
    tl.store(lse + row, top + tl.log(here + away))


def merge(one: Tensor, one_lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge the results of attention over two disjoint sets of keys.

    Args:
        one, other: attention over each set, ``[heads, n, dim]``, rows contiguous.
        one_lse, other_lse: log-sum-exp of the scores, float32 ``[heads, n]``, contiguous.

    Returns:
        Attention over both sets and its log-sum-exp, in float32.
    """
    heads, n, size = one.shape
    out = torch.empty_like(one, dtype=torch.float32)  # with the same strides
    lse = torch.empty_like(one_lse)
    _merge[(heads * n,)](
        one,
        one_lse,
        other,
        other_lse,
        out,
        lse,
        n,
        one.stride(0),
        one.stride(1),
        other.stride(0),
        other.stride(1),
        out.stride(0),
        out.stride(1),
        SIZE=size,
        WIDTH=triton.next_power_of_2(size),
        num_warps=1,
    )
    return out, lse

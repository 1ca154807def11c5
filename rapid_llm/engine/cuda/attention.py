"""Decoding attention in Triton: few new tokens over a long cache, each key and value read once.

The keys are divided among programs (split-KV, as in Flash-Decoding), and the query heads that share
a KV head are rows of one tile, so that a pass of 16 tokens reads as much as a pass of 1. Each
program writes the normalised output of its part and the log-sum-exp of its scores; a second kernel
merges the parts. The length is read from the device, so that a captured pass works for all lengths.
The log-sum-exp can be returned, to merge the result with attention over other keys.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rapid_llm.engine import sdpa
from rapid_llm.engine.cuda.attention_config import FEWEST_ROWS, Config, best_config
from rapid_llm.engine.cuda.state import BUFFERS, CAPACITY, PAST

_LOG2_E = 1.4426950408889634
_LN_2 = 0.6931471805599453
_PAST = tl.constexpr(PAST)
_CAPACITY = tl.constexpr(CAPACITY)
_BUFFERS = tl.constexpr(BUFFERS)

_MOST_ROWS = 64  # of a tile: query heads per KV head times new tokens


@triton.jit
def _parts(past, new, window, splits, BLOCK: tl.constexpr, WINDOWED: tl.constexpr):
    """Number of parts into which the keys are divided, at most one per block."""
    first = 0
    if WINDOWED:
        first = tl.maximum(past - window + 1, 0) // BLOCK
    return tl.minimum(tl.cdiv(past + new, BLOCK) - first, splits)


@triton.jit
def _accumulate(
    acc,
    top,
    total,
    query,
    keys,
    values,
    k_row,
    v_row,
    begin,
    stop,
    last,
    end,
    window,
    scale,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Attend to the blocks in [begin, stop); each row attends to keys up to its ``last``."""
    columns = tl.arange(0, WIDTH)
    for block in range(begin, stop):
        places = block * BLOCK + tl.arange(0, BLOCK)
        k_at = keys + places[:, None] * k_row + columns[None, :]
        v_at = values + places[:, None] * v_row + columns[None, :]
        if MASKED:
            there = (places < end)[:, None] & (columns < DIM)[None, :]
            k = tl.load(k_at, mask=there, other=0.0)
            v = tl.load(v_at, mask=there, other=0.0)
        elif DIM == WIDTH:
            k = tl.load(k_at)
            v = tl.load(v_at)
        else:
            k = tl.load(k_at, mask=(columns < DIM)[None, :], other=0.0)
            v = tl.load(v_at, mask=(columns < DIM)[None, :], other=0.0)
        scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
        if MASKED:
            seen = (places[None, :] <= last[:, None]) & (places < end)[None, :]
            if WINDOWED:
                seen = seen & (places[None, :] > last[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        # A row without any key so far has maximum -inf, which must not be subtracted.
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=["layer", "past", "new", "group", "window", "splits"])
def _attend_part(
    query,
    keys,
    values,
    parts,
    parts_lse,
    state,
    layer,
    past,
    new,
    group,
    window,
    splits,
    scale,
    q_token,
    q_head,
    k_head,
    k_row,
    v_head,
    v_row,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CACHED: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Attention over one part of the keys, for one KV head and one tile of rows."""
    head, split = tl.program_id(0), tl.program_id(1)
    if CACHED:
        past = tl.load(state + _PAST).to(tl.int32)
        k_head = tl.load(state + _CAPACITY) * DIM
        v_head = k_head
        k_row = DIM
        v_row = DIM
        keys = tl.load(state + _BUFFERS + 2 * layer).to(query.dtype)
        values = tl.load(state + _BUFFERS + 2 * layer + 1).to(query.dtype)
        keys = tl.multiple_of(keys, 16)
        values = tl.multiple_of(values, 16)
    used = _parts(past, new, window, splits, BLOCK, WINDOWED)
    if split >= used:
        return
    keys += head.to(tl.int64) * k_head
    values += head.to(tl.int64) * v_head

    rows = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    real = rows < group * new
    token = rows % new
    columns = tl.arange(0, WIDTH)
    whole = real[:, None] & (columns < DIM)[None, :]
    q_at = query + token[:, None] * q_token + (head * group + rows // new)[:, None] * q_head
    q = tl.load(q_at + columns[None, :], mask=whole, other=0.0)

    # The keys that any row of this tile attends to; fewer than all for a tile of a long chunk.
    earliest = past + tl.min(tl.where(real, token, new), axis=0)
    latest = past + tl.max(tl.where(real, token, 0), axis=0)
    first = 0
    if WINDOWED:
        first = tl.maximum(earliest - window + 1, 0) // BLOCK
    blocks = latest // BLOCK + 1 - first
    begin = first + split * blocks // used
    stop = first + (split + 1) * blocks // used

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    last = past + token
    middle = begin
    if not WINDOWED:  # only blocks with new tokens need a mask
        middle = tl.maximum(begin, tl.minimum(stop, (earliest + 1) // BLOCK))
        acc, top, total = _accumulate(
            acc, top, total, q, keys, values, k_row, v_row, begin, middle,
            last, past + new, window, scale, DIM, WIDTH, BLOCK, False, WINDOWED,
        )  # fmt: skip
    acc, top, total = _accumulate(
        acc, top, total, q, keys, values, k_row, v_row, middle, stop,
        last, past + new, window, scale, DIM, WIDTH, BLOCK, True, WINDOWED,
    )  # fmt: skip

    total = tl.where(total > 0, total, 1.0)
    heads = tl.num_programs(0)
    row = split * heads * group * new + head * group * new + rows
    tl.store(parts_lse + row, top + tl.log2(total), mask=real)
    tl.store(parts + row[:, None].to(tl.int64) * DIM + columns, acc / total[:, None], mask=whole)


@triton.jit(do_not_specialize=["past", "new", "window", "splits"])
def _merge_parts(
    parts,
    parts_lse,
    out,
    lse,
    state,
    past,
    new,
    window,
    splits,
    o_token,
    o_head,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    CACHED: tl.constexpr,
    WINDOWED: tl.constexpr,
    RETURNS_LSE: tl.constexpr,
):
    """Merge the parts of one row, for some columns; row h * new + t is head h of token t."""
    row, rows = tl.program_id(0), tl.num_programs(0)
    if CACHED:
        past = tl.load(state + _PAST).to(tl.int32)
    used = _parts(past, new, window, splits, BLOCK, WINDOWED)
    slots = tl.arange(0, SLOTS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    sizes = tl.load(parts_lse + slots * rows + row, mask=slots < used, other=float("-inf"))
    top = tl.max(sizes, axis=0)
    weights = tl.exp2(sizes - top)
    total = tl.sum(weights, axis=0)
    at = parts + (slots * rows + row)[:, None].to(tl.int64) * DIM + columns[None, :]
    part = tl.load(at, mask=(slots < used)[:, None] & (columns < DIM)[None, :], other=0.0)
    mixed = tl.sum(part * weights[:, None], axis=0) / total
    to = out + row % new * o_token + row // new * o_head + columns
    tl.store(to, mixed.to(out.dtype.element_ty), mask=columns < DIM)
    if RETURNS_LSE:
        tl.store(lse + row, (top + tl.log2(total)) * 0.6931471805599453)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    window: int | None = None,
    *,
    lse: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Softmax attention of the last n positions of a sequence of ``length`` tokens.

    Args:
        query: queries of the last n positions, ``[heads, n, dim]``, bfloat16, float16 or float32.
        key, value: keys and values of all positions, ``[kv_heads, length, dim]``, same dtype, rows
            contiguous; ``heads`` is a multiple of ``kv_heads``.
        scaling: factor on the scores.
        window: size of the sliding window: a query at position i attends to the keys in
            ``(i - window, i]``. None for full causal attention.
        lse: output for the log-sum-exp of each row's scores (natural), float32 ``[heads, n]``;
            None if not needed.
        config: launch parameters; None for the best ones for the device.

    Returns:
        ``[heads, n, dim]`` in the query's dtype; in float32 with ``lse``.
    """
    past = key.shape[1] - query.shape[1]
    with torch.cuda.device_of(query):  # Triton launches on the current device
        rows = query.transpose(0, 1)
        return _launch(
            rows, key, value, None, 0, past, key.shape[0], scaling, window, lse, config
        ).transpose(0, 1)


def attend_part(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`rapid_llm.engine.sdpa.attend_part`; each key is read once."""
    if mask is not None and not causal:  # a sliding window that ends within the part
        return sdpa.attend_part(query, key, value, scaling, mask, causal)
    kv_heads, rows, dim = query.shape
    # Rows that see all keys are so many heads of the last token.
    tokens = 1 if mask is None else mask.shape[0]
    heads = query.reshape(kv_heads * rows // tokens, tokens, dim)
    lse = query.new_empty(heads.shape[:2], dtype=torch.float32)
    out = attend(heads, key, value, scaling, lse=lse)
    return out.reshape(query.shape).float(), lse.view(kv_heads, rows)


def attend_cached(
    query: Tensor,
    state: Tensor,
    layer: int,
    kv_heads: int,
    scaling: float,
    window: int | None = None,
    *,
    config: Config | None = None,
) -> Tensor:
    """:func:`attend` over one layer of a cache to which the new tokens are already written.

    Args:
        query: queries of the new tokens, ``[n, heads, dim]``.
        state: state of the cache, int64, see :mod:`rapid_llm.engine.cuda.state`.
        layer: index of the layer.
        kv_heads: number of KV heads of a layer.
        scaling, window, config: see :func:`attend`.

    Returns:
        ``[n, heads, dim]``, contiguous.
    """
    return _launch(query, query, query, state, layer, 0, kv_heads, scaling, window, None, config)


def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor | None,
    layer: int,
    past: int,
    kv_heads: int,
    scaling: float,
    window: int | None,
    lse: Tensor | None,
    config: Config | None,
) -> Tensor:
    n, heads, dim = query.shape
    rows = heads // kv_heads * n
    width = max(16, triton.next_power_of_2(dim))
    most = _MOST_ROWS if width * query.itemsize <= 512 else 32  # limited by the shared memory
    tile = min(most, max(FEWEST_ROWS, triton.next_power_of_2(rows)))
    tiles = triton.cdiv(rows, tile)
    config = config or best_config(query.device, query.dtype, dim, tile, kv_heads * tiles)
    # Results that will be merged are not rounded before.
    out = query.new_empty(n, heads, dim, dtype=query.dtype if lse is None else torch.float32)
    parts = query.new_empty(config.splits, heads * n, dim, dtype=torch.float32)
    parts_lse = query.new_empty(config.splits, heads * n, dtype=torch.float32)
    shared: dict[str, Any] = {
        "DIM": dim,
        "BLOCK": config.block,
        "CACHED": state is not None,
        "WINDOWED": window is not None,
    }
    where = query if state is None else state
    _attend_part[(kv_heads, config.splits, tiles)](
        query,
        key,
        value,
        parts,
        parts_lse,
        where,
        layer,
        past,
        n,
        heads // kv_heads,
        window or 0,
        config.splits,
        scaling * _LOG2_E,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        WIDTH=width,
        ROWS=tile,
        num_warps=config.warps,
        num_stages=config.stages,
        **shared,
    )
    columns = min(width, 64)
    _merge_parts[(heads * n, triton.cdiv(width, columns))](
        parts,
        parts_lse,
        out,
        parts_lse if lse is None else lse,
        where,
        past,
        n,
        window or 0,
        config.splits,
        out.stride(0),
        out.stride(1),
        COLUMNS=columns,
        SLOTS=triton.next_power_of_2(config.splits),
        RETURNS_LSE=lse is not None,
        num_warps=4,
        **shared,
    )
    return out

"""Attention of a joined pass in Triton: each stretch of keys is read once for all that share it.

As in :mod:`rapid_llm.engine.cuda.attention`, a program reads one piece of the keys of one KV head
for a tile of rows; but pieces are of several sequences, and each has tokens of its own. A second
kernel merges the results of all pieces that a token attends to by their log-sum-exp.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rapid_llm.engine.cuda.attention import _LOG2_E, _accumulate
from rapid_llm.engine.cuda.attention_config import FEWEST_ROWS, Config, best_config
from rapid_llm.engine.cuda.batch import CACHE, PIECE, TOKEN, BatchState

_TOKEN = tl.constexpr(TOKEN)
_CACHE = tl.constexpr(CACHE)
_PIECE = tl.constexpr(PIECE)

_MOST_ROWS = 64  # of a tile: query heads per KV head times new tokens


@triton.jit(do_not_specialize=["layer", "cache_size", "group", "window"])
def _attend_piece(
    query,
    parts,
    parts_lse,
    tokens,
    caches,
    pieces,
    layer,
    cache_size,
    group,
    window,
    scale,
    q_token,
    q_head,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Attention over one piece of the keys, for one KV head and one tile of rows."""
    head, heads = tl.program_id(0), tl.num_programs(0) * group
    piece = pieces + tl.program_id(1) * _PIECE
    count = tl.load(piece + 2).to(tl.int32)
    readers = tl.load(piece + 4).to(tl.int32)
    if tl.program_id(2) * ROWS >= readers * group or count == 0:
        return
    start = tl.load(piece + 1)
    cache = caches + tl.load(piece) * cache_size
    at = (head * tl.load(cache) + start) * DIM
    keys = tl.load(cache + _CACHE + 2 * layer).to(query.dtype)
    values = tl.load(cache + _CACHE + 2 * layer + 1).to(query.dtype)
    keys = tl.multiple_of(keys, 16) + at  # else they are not loaded ahead
    values = tl.multiple_of(values, 16) + at

    rows = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    real = rows < readers * group
    token = tl.load(piece + 3).to(tl.int32) + rows // group
    columns = tl.arange(0, WIDTH)
    whole = real[:, None] & (columns < DIM)[None, :]
    row_head = head * group + rows % group
    q_at = query + token[:, None] * q_token + row_head[:, None] * q_head
    q = tl.load(q_at + columns[None, :], mask=whole, other=0.0)

    # The last key of the piece that each row attends to; beyond its end for those of a beginning.
    first = tl.load(cache + 1) + start
    position = tl.load(tokens + token * _TOKEN, mask=real, other=first + count)
    last = (position - first).to(tl.int32)
    earliest = tl.min(last, axis=0)
    begin = 0
    if WINDOWED:
        begin = tl.minimum(tl.maximum(earliest - window + 1, 0), count) // BLOCK
    stop = tl.cdiv(count, BLOCK)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    middle = begin
    if not WINDOWED:  # only blocks with new tokens, or with the end of the piece, need a mask
        middle = tl.maximum(begin, tl.minimum(count, earliest + 1) // BLOCK)
        acc, top, total = _accumulate(
            acc, top, total, q, keys, values, DIM, DIM, begin, middle,
            last, count, window, scale, DIM, WIDTH, BLOCK, False, WINDOWED,
        )  # fmt: skip
    acc, top, total = _accumulate(
        acc, top, total, q, keys, values, DIM, DIM, middle, stop,
        last, count, window, scale, DIM, WIDTH, BLOCK, True, WINDOWED,
    )  # fmt: skip

    total = tl.where(total > 0, total, 1.0)
    row = (tl.load(piece + 5).to(tl.int32) + rows // group) * heads + row_head
    tl.store(parts_lse + row, top + tl.log2(total), mask=real)
    tl.store(parts + row[:, None].to(tl.int64) * DIM + columns, acc / total[:, None], mask=whole)


@triton.jit(do_not_specialize=["count"])
def _merge_pieces(
    parts,
    parts_lse,
    out,
    pieces,
    count,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Merge the pieces that one token attends to, for one head and some columns."""
    token, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    slots = tl.arange(0, SLOTS)
    piece = pieces + slots * _PIECE
    there = slots < count
    there = there & (tl.load(piece + 2, mask=there, other=0) > 0)
    place = token - tl.load(piece + 3, mask=there, other=0)
    there = there & (place >= 0) & (place < tl.load(piece + 4, mask=there, other=0))
    row = (tl.load(piece + 5, mask=there, other=0) + place) * heads + head
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    sizes = tl.load(parts_lse + row, mask=there, other=float("-inf"))
    top = tl.max(sizes, axis=0)
    # A token that only fills the bucket attends to nothing.
    weights = tl.exp2(sizes - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weights, axis=0)
    at = parts + row[:, None] * DIM + columns[None, :]
    part = tl.load(at, mask=there[:, None] & (columns < DIM)[None, :], other=0.0)
    mixed = tl.sum(part * weights[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    to = out + (token * heads + head) * DIM + columns
    tl.store(to, mixed.to(out.dtype.element_ty), mask=columns < DIM)


def tile_of(rows: int, dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Rows of a tile and number of tiles, for so many rows of a KV head."""
    width = max(16, triton.next_power_of_2(dim))
    most = _MOST_ROWS if width * dtype.itemsize <= 512 else 32  # limited by the shared memory
    tile = min(most, max(FEWEST_ROWS, triton.next_power_of_2(rows)))
    return tile, triton.cdiv(rows, tile)


def config_of(
    bucket: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device
) -> Config:
    """Launch parameters for passes of a bucket."""
    tile, tiles = tile_of(heads // kv_heads * bucket, dim, dtype)
    return best_config(device, dtype, dim, tile, kv_heads * tiles)


def attend_batch(
    query: Tensor,
    state: BatchState,
    layer: int,
    kv_heads: int,
    scaling: float,
    window: int | None,
    config: Config,
) -> Tensor:
    """Attention of the tokens of a joined pass, whose keys and values are already written.

    Args:
        query: queries of the tokens, ``[bucket, heads, dim]``.
        state: state of the pass.
        layer: index of the layer.
        kv_heads: number of KV heads of a layer.
        scaling: factor on the scores.
        window: size of the sliding window; None for full causal attention.
        config: launch parameters, those that the state was made for.

    Returns:
        ``[bucket, heads, dim]``, contiguous; 0 for a token that only fills the bucket.
    """
    n, heads, dim = query.shape
    group = heads // kv_heads
    tile, tiles = tile_of(group * n, dim, query.dtype)
    width = max(16, triton.next_power_of_2(dim))
    out = query.new_empty(n, heads, dim)
    parts = query.new_empty(state.rows, heads, dim, dtype=torch.float32)
    parts_lse = query.new_empty(state.rows, heads, dtype=torch.float32)
    most = state.pieces.shape[0]
    _attend_piece[(kv_heads, most, tiles)](
        query,
        parts,
        parts_lse,
        state.tokens,
        state.caches,
        state.pieces,
        layer,
        state.caches.shape[1],
        group,
        window or 0,
        scaling * _LOG2_E,
        query.stride(0),
        query.stride(1),
        DIM=dim,
        WIDTH=width,
        ROWS=tile,
        BLOCK=config.block,
        WINDOWED=window is not None,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    columns = min(width, 64)
    _merge_pieces[(n, heads, triton.cdiv(width, columns))](
        parts,
        parts_lse,
        out,
        state.pieces,
        most,
        DIM=dim,
        COLUMNS=columns,
        SLOTS=triton.next_power_of_2(most),
        num_warps=4,
    )
    return out

"""The CUDA engine's kernels in Triton's interpreter, in float32, against plain arithmetic."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import installed
from torch import Tensor

from rapid_llm.engine.kv_cache import KVCache

installed("triton")

from rapid_llm.engine.cuda import attention, elementwise, prefill
from rapid_llm.engine.cuda.attention import Config
from rapid_llm.engine.cuda.state import describe

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has these")

BLOCK = 16
SPLITS = 3
CONFIG = Config(splits=SPLITS, block=BLOCK, warps=4, stages=2)
EXACT = {"rtol": 1e-5, "atol": 2e-6}


def reference(
    query: Tensor, key: Tensor, value: Tensor, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attention in float64, and the log-sum-exp; the last query stands at the last key."""
    n, length, group = query.shape[1], key.shape[1], query.shape[0] // key.shape[0]
    key, value = (t.double().repeat_interleave(group, dim=0) for t in (key, value))
    scores = query.double() @ key.transpose(1, 2) * query.shape[2] ** -0.5
    at, last = torch.arange(length), torch.arange(length - n, length)[:, None]
    seen = at <= last
    if window is not None:
        seen &= at > last - window
    scores.masked_fill_(~seen, float("-inf"))
    return (scores.softmax(dim=-1) @ value).float(), scores.logsumexp(dim=-1).float()


def drawn(heads: int, kv_heads: int, dim: int, n: int, length: int) -> tuple[Tensor, ...]:
    """A query, and keys and values as views of a buffer whose end is no number."""
    torch.manual_seed(length)
    buffers = [torch.randn(kv_heads, length + 7, dim) for _ in range(2)]
    for buffer in buffers:
        buffer[:, length:] = torch.nan
    return torch.randn(heads, n, dim), *(buffer[:, :length] for buffer in buffers)


def check(heads: int, kv_heads: int, dim: int, n: int, length: int, window: int | None) -> None:
    query, key, value = drawn(heads, kv_heads, dim, n, length)
    lse = torch.empty(heads, n)
    out = attention.attend(query, key, value, dim**-0.5, window, lse=lse, config=CONFIG)
    expected, expected_lse = reference(query, key, value, window)
    torch.testing.assert_close(out, expected, **EXACT)
    torch.testing.assert_close(lse, expected_lse, **EXACT)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 47, 48, 49, 97])
def test_lengths_around_the_borders_of_blocks_and_parts_are_right(length):
    check(4, 2, 16, 1, length, None)
    if length > 5:
        check(4, 2, 16, 5, length, None)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(7, 1, 16), (2, 2, 64), (3, 1, 80), (2, 1, 96), (2, 2, 128), (2, 1, 256), (4, 2, 8)],
)
def test_any_group_of_heads_and_any_size_of_head_is_right(heads, kv_heads, dim):
    check(heads, kv_heads, dim, 3, 33, None)


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 40, 100])
def test_a_query_sees_no_further_back_than_its_window(window):
    check(4, 2, 16, 1, 50, window)
    check(4, 2, 16, 6, 50, window)


@pytest.mark.parametrize("n", [16, 17, 40])
@pytest.mark.parametrize("window", [None, 20])
def test_many_new_tokens_take_several_tiles(n, window):
    check(8, 2, 16, n, 60, window)


def test_the_last_tile_may_hold_few_tokens():
    check(4, 2, 16, 9, 9, None)


def cache_of(key: Tensor, value: Tensor, before: int) -> KVCache:
    """Two layers, of which the second holds these tokens and counts only those before the pass."""
    cache = KVCache(2, key.shape[1] + 7)
    for layer in cache.layers:
        layer.update(key[None], value[None])
        for buffer in (layer.keys, layer.values):
            buffer[:, :, key.shape[1] :] = torch.nan
    cache.layers[0].keys.zero_()
    cache.rollback(before)
    return cache


@pytest.mark.parametrize(("n", "length"), [(1, 33), (5, 48), (16, 70)])
@pytest.mark.parametrize("window", [None, 20])
def test_length_and_buffers_are_read_from_the_device(n, length, window):
    query, key, value = drawn(4, 2, 16, n, length)
    cache = cache_of(key, value, length - n)
    rows = query.transpose(0, 1)
    state = describe(cache)
    out = attention.attend_cached(rows, state, 1, 2, 16**-0.5, window, config=CONFIG)
    expected, _ = reference(query, key, value, window)
    torch.testing.assert_close(out.transpose(0, 1), expected, **EXACT)


def test_parts_of_the_keys_merge_into_the_whole():
    """As a prefix that several sequences share will be."""
    query, key, value = drawn(4, 2, 16, 3, 40)
    parts = []
    for first, last in ((0, 25), (25, 37)):
        seen_by_all = torch.cat([query, torch.zeros(4, 0, 16)], dim=1)
        part, lse = zip(
            *(reference(row, key[:, first:last], value[:, first:last])
              for row in seen_by_all.split(1, dim=1)),
            strict=True,
        )  # fmt: skip
        parts.append((torch.cat(part, dim=1), torch.cat(lse, dim=1)))
    lse = torch.empty(4, 3)
    own = attention.attend(query, key[:, 37:], value[:, 37:], 16**-0.5, lse=lse, config=CONFIG)
    mixed, total = elementwise.merge(*elementwise.merge(*parts[0], *parts[1]), own, lse)
    expected, expected_lse = reference(query, key, value)
    torch.testing.assert_close(mixed, expected, **EXACT)
    torch.testing.assert_close(total, expected_lse, **EXACT)


@pytest.mark.parametrize("chunks", [0, 1, 3, 6])
def test_a_chunk_attends_to_all_that_was_read_before_it(monkeypatch, chunks):
    """With plain arithmetic in the place of cuDNN."""
    asked = set()

    def plain(query, key, value, scaling, *, causal):
        asked.add(key.shape[1])
        if causal:
            return reference(query, key, value)
        rows = [reference(row, key, value) for row in query.split(1, dim=1)]
        return tuple(torch.cat(part, dim=1) for part in zip(*rows, strict=True))

    monkeypatch.setattr(prefill, "CHUNK", 2)
    monkeypatch.setattr(prefill, "_cudnn", plain)
    query, key, value = drawn(4, 2, 16, 2, 2 * chunks + 2)
    out = prefill.attend_chunk(query, key, value, 16**-0.5)
    torch.testing.assert_close(out, reference(query, key, value)[0], **EXACT)
    assert all(keys & (keys - 1) == 0 for keys in asked)  # few shapes: powers of two


@pytest.mark.parametrize("size", [48, 64])
@pytest.mark.parametrize("adds", [True, False])
def test_add_rms_norm_is_the_sum_and_the_norm_of_pytorch(size, adds):
    torch.manual_seed(0)
    x, weight = torch.randn(3, size), torch.rand(size)
    delta = torch.randn(3, size) if adds else None
    total = x + delta if adds else x.clone()
    out = elementwise.add_rms_norm(x, delta, weight, 1e-6)
    torch.testing.assert_close(out, F.rms_norm(total, (size,), weight, 1e-6))
    assert torch.equal(x, total)


@pytest.mark.parametrize("size", [40, 1500])
def test_silu_times_is_the_product_of_pytorch(size):
    torch.manual_seed(0)
    pairs = torch.randn(2, 2 * size)
    gate, up = pairs.split(size, dim=1)
    torch.testing.assert_close(elementwise.silu_times(pairs), F.silu(gate) * up)


@pytest.mark.parametrize("norms", [True, False])
def test_rotated_keys_and_values_stand_behind_what_the_cache_holds(norms):
    torch.manual_seed(0)
    heads, kv_heads, dim, n, held = 3, 2, 24, 2, 5
    qkv, angles = torch.randn(n, (heads + 2 * kv_heads) * dim), torch.randn(n, dim // 2)
    cosine, sine = (torch.cat([f(angles)] * 2, dim=1) for f in (torch.cos, torch.sin))
    weights = torch.rand(dim), torch.rand(dim)
    query, key, value = qkv.clone().view(n, -1, dim).split([heads, kv_heads, kv_heads], dim=1)
    if norms:
        query, key = (
            F.rms_norm(x, (dim,), weight, 1e-5)
            for x, weight in zip((query, key), weights, strict=True)
        )

    def rotated(x: Tensor) -> Tensor:
        half = torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], dim=-1)
        return x * cosine[:, None] + half * sine[:, None]

    held_keys, held_values = torch.randn(2, kv_heads, held, dim).unbind()
    cache = cache_of(held_keys, held_values, held)
    out = elementwise.rotate_and_store(
        qkv,
        (cosine, sine),
        (*weights, 1e-5) if norms else None,
        describe(cache),
        1,
        heads,
        kv_heads,
    )
    layer = cache.layers[1]
    torch.testing.assert_close(out, rotated(query))
    torch.testing.assert_close(layer.keys[0, :, held : held + n], rotated(key).transpose(0, 1))
    torch.testing.assert_close(layer.values[0, :, held : held + n], value.transpose(0, 1))
    assert torch.equal(layer.keys[0, :, :held], held_keys)
    assert torch.equal(layer.values[0, :, :held], held_values)
    assert layer.keys[0, :, held + n :].isnan().all()

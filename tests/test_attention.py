"""The attention kernels against the textbook formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rapid_llm.engine import attention, sdpa
from rapid_llm.engine.cpu import attention as cpu_attention


def textbook(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None):
    """Repeated KV heads, a full mask, one softmax: in float64."""
    heads, n, _ = query.shape
    length = key.shape[1]
    key, value = (t.double().repeat_interleave(heads // key.shape[0], dim=0) for t in (key, value))
    scores = query.double() @ key.transpose(1, 2) * scaling
    position = torch.arange(length - n, length)[:, None]
    seen = torch.arange(length) <= position
    if window is not None:
        seen &= torch.arange(length) > position - window
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value


@pytest.mark.parametrize(
    "kernel", [cpu_attention._attend_products, sdpa.attend, cpu_attention._attend_batched]
)
@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize(
    ("n", "length"), [(1, 1), (1, 130), (4, 4), (11, 130), (33, 33), (70, 130), (130, 130)]
)
def test_kernels_follow_the_formula(kernel, window, n, length):
    torch.manual_seed(n + length)
    query = torch.randn(6, n, 16)
    buffer = torch.randn(2, 2, length + 9, 16)  # a cache that has room left
    key, value = buffer[:, :, :length]
    expected = textbook(query, key, value, 0.3, window)
    out = kernel(query, key, value, 0.3, window)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keys", [2049, 2500, 4096])
def test_a_long_sum_over_keys_may_be_divided(keys):
    torch.manual_seed(keys)
    query, key, value = torch.randn(6, 5, 16), torch.randn(2, keys, 16), torch.randn(2, keys, 16)
    out = attention.attend(query, key, value, 0.3)
    expected = textbook(query, key, value, 0.3, None)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_window_as_long_as_the_sequence_changes_nothing():
    query, key, value = torch.randn(4, 5, 8), torch.randn(2, 20, 8), torch.randn(2, 20, 8)
    full = attention.attend(query, key, value, 0.5)
    assert torch.equal(attention.attend(query, key, value, 0.5, window=20), full)
    assert not torch.equal(attention.attend(query, key, value, 0.5, window=19), full)


def test_bfloat16_is_about_as_accurate_as_sdpa():
    torch.manual_seed(0)
    query, key, value = torch.randn(9, 5, 64), torch.randn(3, 900, 64), torch.randn(3, 900, 64)
    exact = textbook(query, key, value, 0.125, None)
    half = [t.bfloat16() for t in (query, key, value)]
    ours = (cpu_attention._attend_products(*half, 0.125, None).double() - exact).square().mean()
    theirs = (sdpa.attend(*half, 0.125, None).double() - exact).square().mean()
    assert ours < 3 * theirs  # scores are rounded to bfloat16 before the softmax


def test_scores_are_computed_for_a_block_of_queries_at_a_time(monkeypatch):
    """Prefill memory grows with the block, not with the square of the length."""
    widths = []
    softmax = torch.Tensor.softmax

    def spy(self, *args, **kwargs):
        widths.append(self.shape[0])
        return softmax(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "softmax", spy)
    cpu_attention._attend_products(
        torch.randn(6, 500, 8), torch.randn(2, 500, 8), torch.randn(2, 500, 8), 1.0, None
    )
    assert max(widths) == 3 * cpu_attention._QUERY_BLOCK

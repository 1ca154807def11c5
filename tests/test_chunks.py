"""Which passes read a prompt, and which of them two prompts share: for all short lengths."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import pytest

from rapid_llm.engine.chunks import pass_ends
from rapid_llm.engine.cpu.device import CPU
from rapid_llm.engine.cuda.device import CUDA
from rapid_llm.engine.device import Device
from rapid_llm.engine.prefix_cache.chain import PassChain

SIZES = [(8,), (8, 4), (8, 4, 2), (8, 2), (9, 4, 3), (8, 3, 1)]
LONGEST = 34


def passes(ends: list[int], until: int) -> list[tuple[int, int]]:
    """(past, tokens) of the passes that read the first so many tokens."""
    return [(start, end - start) for start, end in pairwise((0, *ends)) if end <= until]


@cache
def chain(tokens: int, same: int, sizes: tuple[int, ...]) -> PassChain:
    """Of a prefill whose first tokens are those of another."""
    ids = np.arange(tokens, dtype=np.int32)
    ids[same:] += 1000
    return PassChain.of(ids, sizes)


def common_end(tokens: int, other: int, same: int, sizes: tuple[int, ...]) -> int:
    return chain(tokens, tokens, sizes).common(chain(other, same, sizes))


@pytest.mark.parametrize("sizes", SIZES)
def test_a_prefill_reads_every_token_once_in_chunks_and_then_in_smaller_pieces(sizes):
    for tokens in range(LONGEST):
        ends = pass_ends(tokens, sizes)
        read = [n for _, n in passes(ends, tokens)]
        assert sum(read) == tokens
        assert all(n > 0 for n in read)
        assert read == sorted(read, reverse=True)
        assert read[: tokens // sizes[0]] == [sizes[0]] * (tokens // sizes[0])
        assert set(read[:-1]) <= set(sizes)
        assert sum(read[tokens // sizes[0] :]) < sizes[0]


@pytest.mark.parametrize("sizes", SIZES)
def test_what_is_shared_was_read_by_the_passes_of_both_prefills_and_it_is_the_longest(sizes):
    for one in range(LONGEST):
        for other in range(LONGEST):
            ends, others = pass_ends(one, sizes), pass_ends(other, sizes)
            for same in range(min(one, other) + 1):
                shared = common_end(one, other, same, sizes)
                assert shared <= same
                assert shared in (0, *ends)
                assert passes(ends, shared) == passes(others, shared)
                assert not any(
                    end in others and passes(ends, end) == passes(others, end)
                    for end in ends
                    if shared < end <= same
                )


@pytest.mark.parametrize("sizes", SIZES)
def test_prompts_with_as_many_chunks_share_more_than_chunks(sizes):
    for one in range(1, LONGEST):
        assert common_end(one, one, one, sizes) == one
        for other in range(1, LONGEST):
            same = min(one, other)
            shared = common_end(one, other, same, sizes)
            assert shared >= same // sizes[0] * sizes[0]


@pytest.mark.parametrize("device", [Device, CPU, CUDA])
def test_sizes_descend(device):
    sizes = (device.prefill_chunk, *device.prefill_pieces)
    assert list(sizes) == sorted(set(sizes), reverse=True)

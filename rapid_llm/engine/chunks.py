"""The passes that read a prompt, and those that two prompts have in common.

What a pass computes depends, bit for bit, on what it reads, on what was read before it and on how
many tokens each of these passes took: those of other sizes round otherwise. So the passes of a
prefill follow from the prompt's length alone, and KV serves another prompt as far as its own
prefill would run the same passes over the same tokens.

Most of a prompt is read in chunks, as large as the device is best used by. What is left of it is
read in ever smaller pieces, so that a prompt of about the same length has all but the smallest in
common. Where one prompt has a whole chunk and the other reads its tokens in pieces, both begin with
the chunks before it.
"""

from __future__ import annotations

from collections.abc import Sequence


def pass_ends(tokens: int, sizes: Sequence[int]) -> list[int]:
    """Where the passes of a prefill of so many tokens end, ascending; the last reads the last.

    Args:
        tokens: to be read, at least 0.
        sizes: of passes, descending: there are as many of each as fit, and one for what is left.
    """
    ends: list[int] = []
    end = 0
    for size in sizes:
        stop = end + (tokens - end) // size * size
        ends += range(end + size, stop + 1, size)
        end = stop
    return ends if end == tokens else [*ends, tokens]


def common_end(ends: Sequence[int], others: Sequence[int], tokens: int) -> int:
    """Where the last of the first passes ends that two prefills have in common; 0 without any.

    Args:
        ends, others: of each prefill's passes, see :func:`pass_ends`.
        tokens: with which both sequences begin.
    """
    common = 0
    for end, other in zip(ends, others, strict=False):
        if end != other or end > tokens:
            break
        common = end
    return common

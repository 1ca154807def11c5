"""Chunked prefill: divide a prompt into passes.

The exact bits of KV depend on the tokens and on the sizes of all passes so far, because passes of
other sizes round differently. So the passes of a prefill are a function of the prompt's length
alone, and KV is reused for another prompt only as far as its own prefill would run the same passes
over the same tokens.

Most of a prompt is read in chunks of the size that is fastest on the device. The rest is read in
smaller and smaller pieces, so that prompts of about the same length share all but the smallest.
"""

from __future__ import annotations

from collections.abc import Sequence


def pass_ends(tokens: int, sizes: Sequence[int]) -> list[int]:
    """End positions of the passes of a prefill, ascending.

    Args:
        tokens: number of tokens to read, at least 0.
        sizes: sizes of passes, descending. As many of each as fit are run, then one smaller pass
            for the rest.
    """
    ends: list[int] = []
    end = 0
    for size in sizes:
        stop = end + (tokens - end) // size * size
        ends += range(end + size, stop + 1, size)
        end = stop
    return ends if end == tokens else [*ends, tokens]

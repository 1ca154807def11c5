"""One model reading one sequence: prefill it, extend it, roll it back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rapid_llm.engine.forward import Forward
from rapid_llm.engine.kv_cache import KVCache

PREFILL_CHUNK = 512
"""Tokens a prefill pass: bounds its activations, and how long a progress bar stands still. KV is
reused in whole chunks, so a prompt that was read before costs less than another one."""

PrefillProgress = Callable[[int, int], None]
"""Called with (tokens read, tokens to read)."""


def whole_chunks(tokens: int) -> int:
    """Of the first so many tokens of a prompt, those that whole chunks of its prefill read.

    Their keys and values are the same, bit for bit, for every prompt that begins with them.
    """
    return tokens // PREFILL_CHUNK * PREFILL_CHUNK


class Session:
    """A forward function with the KV cache of one sequence.

    Args:
        forward: the model.
        cache: made for it; may hold the beginning of the sequence.
    """

    def __init__(self, forward: Forward, cache: KVCache) -> None:
        self.forward = forward
        self.cache = cache
        forward.refresh()

    @property
    def length(self) -> int:
        """Tokens of the sequence that were read."""
        return self.cache.skipped + self.cache.length

    def prefill(self, tokens: Sequence[int], progress: PrefillProgress | None = None) -> None:
        """Read, in chunks, those tokens of a prompt that the cache does not hold yet.

        The cache holds whole chunks or all of them, so that the passes are those of a prefill from
        the beginning: sums of another size would round otherwise.
        """
        for start in range(self.length, len(tokens), PREFILL_CHUNK):
            assert start == whole_chunks(start)
            if progress is not None:
                progress(start, len(tokens))
            chunk = torch.tensor(tokens[start : start + PREFILL_CHUNK])
            self.forward(chunk, self.cache, keep_logits=1)
        if progress is not None:
            progress(len(tokens), len(tokens))

    def extend(self, tokens: Tensor, keep: int | None = None) -> Tensor:
        """Read int64 ``[n]`` tokens; float32 logits ``[n, vocab]``, row i follows token i.

        ``keep``: only those of the last so many tokens.
        """
        return self.forward(tokens, self.cache, keep or tokens.shape[0])

    def rollback(self, length: int) -> None:
        """Keep the first ``length`` tokens at most."""
        self.cache.rollback(length - self.cache.skipped)

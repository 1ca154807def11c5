"""One model reading one sequence: prefill it, extend it, roll it back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rapid_llm.engine.forward import Forward

PREFILL_CHUNK = 512
"""Tokens a prefill pass: bounds its activations, and how long a progress bar stands still."""

PrefillProgress = Callable[[int, int], None]
"""Called with (tokens read, tokens to read)."""


class Session:
    """A forward function with the KV cache of one sequence.

    Args:
        forward: the model.
        capacity: tokens the sequence can grow to.
    """

    def __init__(self, forward: Forward, capacity: int) -> None:
        self.forward = forward
        self.cache = forward.new_cache(capacity)

    @property
    def length(self) -> int:
        """Tokens the cache holds."""
        return self.cache.length

    def prefill(self, tokens: Sequence[int], progress: PrefillProgress | None = None) -> None:
        """Read tokens in chunks; no logits are kept."""
        for start in range(0, len(tokens), PREFILL_CHUNK):
            if progress is not None:
                progress(start, len(tokens))
            chunk = torch.tensor(tokens[start : start + PREFILL_CHUNK])
            self.forward(chunk, self.cache, keep_logits=1)
        if progress is not None:
            progress(len(tokens), len(tokens))

    def extend(self, tokens: Tensor) -> Tensor:
        """Read int64 ``[n]`` tokens; float32 logits ``[n, vocab]``, row i follows token i."""
        return self.forward(tokens, self.cache, keep_logits=tokens.shape[0])

    def rollback(self, length: int) -> None:
        """Keep the first ``length`` tokens at most."""
        self.cache.rollback(length)

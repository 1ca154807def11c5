"""One model reading one sequence: prefill it, extend it, roll it back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rapid_llm.engine.cuda import prefill
from rapid_llm.engine.forward import Choice, Forward
from rapid_llm.engine.kv_cache import KVCache

PREFILL_CHUNK = 512
"""Tokens a prefill pass on a CPU: bounds its activations, and how long a progress bar stands still.
On CUDA it is :data:`rapid_llm.engine.cuda.prefill.CHUNK`."""

PrefillProgress = Callable[[int, int], None]
"""Called with (tokens read, tokens to read)."""


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
        """Read, in chunks, those tokens of a prompt that the cache does not hold yet."""
        size = prefill.CHUNK if self.forward.device.type == "cuda" else PREFILL_CHUNK
        for start in range(self.length, len(tokens), size):
            if progress is not None:
                progress(start, len(tokens))
            chunk = torch.tensor(tokens[start : start + size])
            self.forward(chunk, self.cache, keep_logits=1)
        if progress is not None:
            progress(len(tokens), len(tokens))

    def extend(self, tokens: Tensor, keep: int | None = None) -> Tensor:
        """Read int64 ``[n]`` tokens; float32 logits ``[n, vocab]``, row i follows token i.

        ``keep``: only those of the last so many tokens.
        """
        return self.forward(tokens, self.cache, keep or tokens.shape[0])

    def draft(
        self, pending: Tensor, steps: int, choice: Choice, generator: torch.Generator
    ) -> tuple[Tensor, Tensor] | None:
        """Read the pending tokens and draft after them without the host, where that can be done.

        Returns:
            int64 ``[at most steps]``, and the q that each was drawn from, ``[…, width]``; or None,
            and nothing was read.
        """
        room = self.cache.capacity - self.cache.length
        if not self.forward.loops or self.cache.length == 0 or room < len(pending) + steps - 1:
            return None
        return self.forward.draft(pending, steps, self.cache, choice, generator)

    def rollback(self, length: int) -> None:
        """Keep the first ``length`` tokens at most."""
        self.cache.rollback(length - self.cache.skipped)

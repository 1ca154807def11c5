"""One model reading one sequence: prefill it, extend it, roll it back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from rapid_llm.engine.chunks import pass_ends
from rapid_llm.engine.device import Judge, TokenSampler
from rapid_llm.engine.kv_cache import KVCache
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.errors import OutdatedKVError

PrefillProgress = Callable[[int, int], None]
"""Called with (tokens read, tokens to read)."""


class Session:
    """A forward function with the KV cache of one sequence.

    Where what the cache holds is no longer what the model would compute, as another adapter was
    chosen or the sequence has outgrown what a rotary embedding was made for, it is read again.

    Args:
        runner: the model.
        cache: made for it; may hold the beginning of the sequence.
        tokens: begin with what the cache holds.
    """

    def __init__(self, runner: ModelRunner, cache: KVCache, tokens: Sequence[int] = ()) -> None:
        self.runner = runner
        self.cache = cache
        self._ends: list[int] = []  # of the passes of its prefill
        self._tokens = torch.empty(cache.capacity, dtype=torch.long, device=runner.device)
        self._knows = cache.position_offset == 0 and len(tokens) >= cache.length
        if self._knows:
            held = torch.tensor(tokens[: cache.length], dtype=torch.long, device="cpu")
            # Of tokens that the model has not, its last one was read: see RagDrafter.
            self._tokens[: cache.length] = held.clamp(max=runner.vocab_size - 1)

    @property
    def length(self) -> int:
        """Tokens of the sequence that were read."""
        return self.cache.position_offset + self.cache.length

    @property
    def room(self) -> int:
        """Tokens that can be read before the cache is full or the rotary embedding switches."""
        ends = [at for at in self.runner.switches if at > self.length]
        return min([self.cache.capacity - self.cache.length, *(at - self.length for at in ends)])

    def prefill(self, tokens: Sequence[int], progress: PrefillProgress | None = None) -> None:
        """Read, in passes, those tokens of a prompt that the cache does not hold yet.

        Another token is to follow them. The cache holds what the first of these passes read, so
        that all are those of a prefill from the beginning: :mod:`rapid_llm.engine.chunks`.
        """
        self._ends = pass_ends(len(tokens), self.runner.prefill_sizes)
        held = self.length
        assert held in (0, *self._ends)
        for start, end in pairwise((held, *(end for end in self._ends if end > held))):
            if progress is not None:
                progress(start, len(tokens))
            part = self.runner.tensor(tokens[start:end])
            self._read(part, 1, len(tokens) + 1)
        if progress is not None:
            progress(len(tokens), len(tokens))

    def extend(self, tokens: Tensor, keep: int | None = None) -> Tensor:
        """Read int64 ``[n]`` tokens; float32 logits ``[n, vocab]``, row i follows token i.

        ``keep``: only those of the last so many tokens.
        """
        start, n = self.length, tokens.shape[0]
        ends = [at - start for at in sorted(self.runner.switches) if start < at < start + n]
        if not ends:
            return self._read(tokens, keep or n, start + n)
        rows = [
            self._read(tokens[first:end], end - first, start + end)
            for first, end in pairwise((0, *ends, n))
        ]
        return torch.cat(rows)[n - (keep or n) :]

    def _read(self, tokens: Tensor, keep: int, length: int) -> Tensor:
        """Append tokens of a sequence that is so long with what follows them."""
        start = self.cache.length
        self.cache.expected = length
        try:
            logits = self.runner(tokens, self.cache, keep)
        except OutdatedKVError:
            if not self._knows:
                raise
            self._read_again()
            logits = self.runner(tokens, self.cache, keep)
        if self._knows:  # noted while the device works
            self._tokens[start : self.cache.length] = tokens
        return logits

    def _read_again(self) -> None:
        """By the passes of the prefill, as the prompt's KV may be kept; then what followed."""
        held = self._tokens[: self.cache.length]
        ends = [end for end in self._ends if end <= len(held)]
        prompt = max(ends, default=0)
        rest = pass_ends(len(held) - prompt, self.runner.prefill_sizes)
        self.cache.rollback(0)
        for start, end in pairwise((0, *ends, *(prompt + end for end in rest))):
            self.runner(held[start:end], self.cache, 1)

    def draft(
        self, pending: Tensor, steps: int, choice: TokenSampler, generator: torch.Generator
    ) -> tuple[Tensor, Tensor] | None:
        """Read the pending tokens and draft after them without the host, where that can be done.

        Returns:
            int64 ``[at most steps]``, and the q that each was drawn from, ``[…, width]``; or None,
            and nothing was read.
        """
        start = self.cache.length
        room = self.cache.capacity - start
        if start == 0 or room < len(pending) + steps - 1:
            return None
        try:
            drafted = self.runner.draft(pending, steps, self.cache, choice, generator)
        except OutdatedKVError:
            return None  # for a pass to read it again
        if drafted is None:
            return None
        tokens, rows = drafted
        if self._knows:
            self._tokens[start : self.cache.length] = torch.cat([pending, tokens[:-1]])
        return tokens, rows

    def verify(
        self,
        tokens: Tensor,
        q: Tensor,
        eta: Tensor | None,
        judge: Judge,
        generator: torch.Generator,
    ) -> Tensor | None:
        """Read tokens that end with a draft and judge it without the host, where that can be done.

        Args:
            tokens: int64 ``[γ+1]``, one that was not read and the draft after it.
            q, eta, judge, generator: see :class:`rapid_llm.engine.device.Judge`.

        Returns:
            What the judge says; or None, and nothing was read.
        """
        start, n = self.cache.length, tokens.shape[0]
        if start == 0 or self.cache.capacity - start < n:
            return None
        self.cache.expected = self.length + n
        try:
            verdict = self.runner.verify(tokens, q, eta, self.cache, judge, generator)
        except OutdatedKVError:
            return None  # for a pass to read it again
        if verdict is not None and self._knows:
            self._tokens[start : self.cache.length] = tokens
        return verdict

    def rollback(self, length: int) -> None:
        """Keep the first ``length`` tokens at most."""
        self.cache.rollback(length - self.cache.position_offset)
